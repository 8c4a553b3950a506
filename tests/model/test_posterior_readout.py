"""Proves the posterior readout: Bayes' rule on the network's logits, and what follows from it for a chain of any length."""

import math

import pytest
import torch
from scipy.stats import chisquare

from rdtrain.evaluate.chain_likelihood import likelihood_of_chain
from rdtrain.model.denoiser import denoise
from rdtrain.model.generation import Sampling, TextGenerator, generate
from rdtrain.model.noise import NoiseSchedule, NoiseSettings

TOKENS = torch.randint(50, (8, 13), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def models(build_model):
    """The same weights with and without the posterior readout."""
    return build_model(True, posterior_readout=True), build_model(True)


@pytest.mark.parametrize("sigma", [[[0.3]] * 8, [[0.1 + 0.05 * place for place in range(12)]] * 8], ids=["sequence", "token"])
def test_the_logits_are_the_networks_and_the_log_density_of_the_state_under_each_token(models, sigma):
    with_evidence, without = models
    sigma = torch.tensor(sigma)
    eps = torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(1))
    z = with_evidence.unit_embedding(TOKENS[:, 1:]) + sigma.unsqueeze(-1) * eps
    posterior, network = (denoise(model, z, model.prelude(TOKENS[:, :-1]), sigma, 32**-0.5) for model in models)
    table = without.embedding.weight.detach().double()
    unit = table / table.norm(dim=-1, keepdim=True)
    density = -(z.detach().double().unsqueeze(-2) - unit).square().sum(-1) / (2 * sigma.double()[..., None].square())
    expected = (network.double() + density).log_softmax(-1)
    torch.testing.assert_close(posterior.double().log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


def test_the_evidence_is_known_and_sends_no_gradient(models):
    model, _ = models
    z = torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    hidden = torch.zeros(8, 12, 32)
    logits = model.head(hidden, (z / 0.09).detach())
    assert logits.abs().max() > 1
    (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), model.embedding.weight)
    assert (gradient == 0).all(), "only the network's part, which is zero here, trains the embedding"


def test_an_optional_state_is_left_out_at_first_and_can_be_learned_to_be_used(build_model):
    """Two states of one noise level: without their evidence the logits are the same, to the bit, until the adapter's part has moved."""
    model = build_model(True, perturbed=False, optional_state=True)
    states = [torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    sigma = torch.full((8, 1), 0.3)

    def priors():
        return [denoise(model, z, model.prelude(TOKENS[:, :-1]), sigma, 32**-0.5) for z in states]

    one, other = priors()
    assert torch.equal(one, other)
    (gradient,) = torch.autograd.grad(one.square().sum(), model.cores[0].adapter.weight)
    assert gradient[:, :32].abs().max() > 0
    with torch.no_grad():
        model.cores[0].adapter.weight -= 0.1 * gradient / gradient.abs().max()
    one, other = priors()
    assert (one - other).abs().max() > 1e-3


def silent(model):
    """A network that says nothing: its logits are all zero, so its prior is uniform."""
    torch.nn.init.zeros_(model.final_norm.weight)
    return model.requires_grad_(False)


@pytest.mark.parametrize("partition", ["equi_probability", "uniform"])
def test_a_uniform_prior_has_the_likelihood_of_one_for_any_number_of_iterations(build_model, partition):
    noise = NoiseSchedule(NoiseSettings(partition=partition))
    generator = TextGenerator(silent(build_model(True, posterior_readout=True)), noise, tokenizer=None)
    tokens = torch.randint(50, (64, 33), generator=torch.Generator().manual_seed(4))
    for point in likelihood_of_chain(generator, [1, 4, 16], tokens, 1.0, 64):
        assert abs(point["nll"] - math.log(50)) < 4 * point["standard_error"] + 1e-3 and point["standard_error"] < 0.02


@pytest.mark.parametrize("iterations", [2, 8])
def test_the_ancestral_chain_draws_from_the_networks_prior(build_model, iterations):
    """5,000 tokens of the real chain, at levels as coarse as can be."""
    model, noise = silent(build_model(True, posterior_readout=True)), NoiseSchedule(NoiseSettings())
    prompt = torch.zeros(5_000, 1, dtype=torch.long)
    (drawn,) = generate(model, prompt, 1, iterations, noise, Sampling(solver="ancestral"), seed=1)
    assert chisquare(torch.bincount(drawn, minlength=50)).pvalue > 1e-3


@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_any_number_of_iterations_draws_from_the_sharpened_and_cut_prior(build_model, iterations):
    """5,000 tokens of the real chain of a network that has one opinion, whatever its state."""
    model, noise = build_model(True, posterior_readout=True).requires_grad_(False), NoiseSchedule(NoiseSettings())
    opinion = 8 * torch.randn(32, generator=torch.Generator().manual_seed(5)) / 32**0.5
    model.coda = lambda state, *rest: opinion.expand(state.shape)
    logits = (model.embedding.weight @ opinion).double()
    kept = logits.topk(20).indices
    expected = 5_000 * (logits[kept] / 0.6).softmax(0)
    prompt = torch.zeros(5_000, 1, dtype=torch.long)
    (drawn,) = generate(model, prompt, 1, iterations, noise, Sampling(temperature=0.6, top_k=20, solver="ancestral"), seed=1)
    counts = torch.bincount(drawn, minlength=50)[kept]
    assert counts.sum() == 5_000 and chisquare(counts, expected).pvalue > 1e-3

    (greedy,) = generate(model, prompt[:50], 1, iterations, noise, Sampling(temperature=0.0, solver="ancestral"), seed=1)
    assert (greedy == logits.argmax()).all(), "greedy is the mode of the prior, not what the noise makes of it"
