"""Proves the bound on a chain's likelihood in a world whose posterior is known, where it must be the exact entropy at every K."""

import pytest
import torch

from rdtrain.evaluate.chain_likelihood import ancestral_nats

PRIOR = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.07, 0.03], dtype=torch.float64)
LEVELS = [[80.0], [80.0, 0.5], [80.0, 2.0, 0.5, 0.2], [80 * (0.05 / 80) ** (k / 15) for k in range(16)]]


@pytest.fixture
def targets():
    """Six targets of length one in four dimensions."""
    return torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64), dim=-1)


def bound(unit_embeddings, levels, believed, trust=1.0):
    """Mean excess of the bound over -ln believed(x), for x drawn from PRIOR, and its standard error. The denoiser's posterior is Bayes'
    rule on its believed prior, with the evidence of the state taken `trust` times."""
    generator = torch.Generator().manual_seed(0)
    x = torch.multinomial(PRIOR, 40_000, replacement=True, generator=generator).view(200, 200)

    def predict(k, z):
        return believed.log() + trust * z @ unit_embeddings.T / levels[k] ** 2

    def normal():
        return torch.randn(200, 200, 4, generator=generator, dtype=torch.float64)

    excess = ancestral_nats(predict, x, unit_embeddings, [*levels, 0.0], normal) + believed.log()[x]
    return excess.mean().item(), excess.std().item() / 200


@pytest.mark.parametrize("levels", LEVELS, ids=len)
@pytest.mark.parametrize("believed", [PRIOR, torch.full((6,), 1 / 6, dtype=torch.float64)], ids=["right", "wrong"])
def test_posteriors_by_bayes_rule_have_the_likelihood_of_their_prior_at_any_number_of_iterations(levels, believed, targets):
    excess, error = bound(targets, levels, believed)
    assert abs(excess) < 4 * error + 1e-4 and error < 0.005


@pytest.mark.parametrize("trust", [0.5, 2.0])
def test_posteriors_that_contradict_each_other_cost_likelihood(trust, targets):
    excess, error = bound(targets, LEVELS[-1], PRIOR, trust)
    assert excess > 0.05 > 4 * error


def test_the_first_term_is_what_pure_noise_costs_for_a_target_of_length_one(targets):
    """At a low sigma_max pure noise is a bad start, and the bound says so: by the KL divergence of the two normal laws."""
    levels = [0.5, 0.2]
    free = bound(targets, [80.0, *levels], PRIOR)[0]
    assert bound(targets, levels, PRIOR)[0] > free + 0.5
    nats = ancestral_nats(lambda k, z: torch.tensor([0.0, -1e9]).expand(1, 1, 2), torch.zeros(1, 1, dtype=torch.long),
                          torch.eye(2), [0.5, 0.0], lambda: torch.zeros(1, 1, 2))
    start = torch.distributions.Normal(torch.tensor([1.0, 0.0]), 0.5)
    pure = torch.distributions.Normal(torch.zeros(2), 0.5)
    assert nats.item() == pytest.approx(torch.distributions.kl_divergence(start, pure).sum().item())
