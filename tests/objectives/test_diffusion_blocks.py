"""Proves the denoising objective right: its loss against a recomputation of each sequence from the method's formulas, its draws
against scipy, that training is one pass which couples no iterations, and that held-out likelihood starts from noise alone."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks, ObjectiveSettings, build_objective
from rdtrain.objectives import diffusion_blocks as diffusion_blocks_module

K = 4
INDICES = [11, 3, 8, 40, 5, 21]
SIGMA_DATA = 1 / math.sqrt(32)


def log_truncnorm(settings, low, high):
    ends = [(math.log(end) - settings.p_mean) / settings.p_std for end in (low, high)]
    return scipy.stats.truncnorm(*ends, loc=settings.p_mean, scale=settings.p_std)


def widened_interval(settings, k, iterations=K):
    """Interval of iteration k in 1..K: equal probabilities by scipy, the paper's overlap, clipped."""
    whole = log_truncnorm(settings, settings.sigma_min, settings.sigma_max)
    high, low = math.exp(whole.ppf(1 - (k - 1) / iterations)), math.exp(whole.ppf(1 - k / iterations))
    factor = (high / low) ** settings.overlap
    return max(low / factor, settings.sigma_min), min(high * factor, settings.sigma_max)


def cross_entropies(logits, targets):
    """-ln softmax(logits)[target] of each position of one sequence, in float64, one position at a time."""
    logits = logits.detach().double().numpy()
    normalisers = [np.log(np.exp(row - row.max()).sum()) + row.max() for row in logits]
    return np.array([normaliser - row[target] for normaliser, row, target in zip(normalisers, logits, targets.tolist())])


def denoise_by_hand(model, z, inputs, sigma):
    """Logits [T, V] of one sequence, EDM's scalings in float64; the readout is given the estimate over sigma_data."""
    total = sigma**2 + SIGMA_DATA**2
    conditioning = model.condition(torch.tensor([[math.log(sigma) / 4]]))
    core_input = (z / math.sqrt(total)).float()
    hidden = model.iterate(core_input.unsqueeze(0), model.prelude(inputs.unsqueeze(0)), conditioning)[0].double()
    estimate = SIGMA_DATA**2 / total * z + sigma * SIGMA_DATA / math.sqrt(total) * hidden
    return model.readout((estimate / SIGMA_DATA).float().unsqueeze(0), conditioning)[0]


def loss_by_hand(model, settings, sequence, random):
    """(iteration counted from 0, mean loss) of one sequence, with the same uniform and normal numbers as the objective's."""
    uniform = random.uniform(3)[0].double()
    if uniform[0] < settings.share_at_sigma_max:
        iteration, sigma = 0, settings.sigma_max
    else:
        iteration = int(uniform[1] * K)
        sigma = math.exp(log_truncnorm(settings, *widened_interval(settings, iteration + 1)).ppf(uniform[2].item()))
    eps = random.normal(8, 32)[0].double()
    rows = model.embedding.weight.detach().double()[sequence[1:]]
    y = rows / rows.square().sum(-1, keepdim=True).sqrt()
    return iteration, cross_entropies(denoise_by_hand(model, y + sigma * eps, sequence[:-1], sigma), sequence[1:]).mean()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_and_its_share_of_each_iteration_equal_a_recomputation_by_hand(share, build_model, tokens, random_of):
    settings = NoiseSettings(share_at_sigma_max=share)
    model = build_model(True, norm_eps=0.1)  # so large that the readout's norm does not hide the scale of what it is given
    loss = DiffusionBlocks(settings, K)(model, tokens, random_of(INDICES))
    by_hand = [loss_by_hand(model, settings, row, random_of([index])) for row, index in zip(tokens, INDICES)]
    assert loss.value.item() == pytest.approx(np.mean([value for _, value in by_hand]), rel=1e-4)
    assert loss.value.requires_grad
    assert set(loss.metrics) == {"loss", "loss_by_iteration"}
    total, count = loss.metrics["loss"]
    assert not total.requires_grad and total.item() / count.item() == pytest.approx(loss.value.item(), rel=1e-5)
    sums, counts = loss.metrics["loss_by_iteration"]
    assert not sums.requires_grad and not counts.requires_grad
    assert sums.shape == counts.shape == (K,)
    for iteration in range(K):
        values = [value for k, value in by_hand if k == iteration]
        assert counts[iteration] == len(values)
        assert sums[iteration].item() == pytest.approx(sum(values), rel=1e-4)
    assert sums.sum().item() / counts.sum().item() == pytest.approx(loss.value.item(), rel=1e-5)


def test_metrics_of_micro_batches_add_up_to_those_of_the_batch(build_model, tokens, random_of):
    objective, model = DiffusionBlocks(NoiseSettings(), K), build_model(True)
    whole = objective(model, tokens, random_of(INDICES)).metrics
    parts = [objective(model, tokens[rows], random_of(INDICES[rows])).metrics for rows in (slice(0, 2), slice(2, 6))]
    for name, expected in whole.items():
        for kind in (0, 1):
            torch.testing.assert_close(parts[0][name][kind] + parts[1][name][kind], expected[kind], rtol=1e-4, atol=1e-5)


def test_the_recomputed_batch_has_more_than_one_iteration_and_both_kinds_of_sequence(random_of):
    iteration, sigma = DiffusionBlocks(NoiseSettings(), K).draw(random_of(INDICES))
    assert len(set(iteration.tolist())) >= 3
    assert 1 <= (sigma == 80.0).sum() < 6


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("iterations", [1, 8])
def test_draws_have_uniform_iterations_the_set_share_of_pure_noise_and_levels_of_their_interval(share, iterations, random_of):
    settings, samples = NoiseSettings(share_at_sigma_max=share), 4000
    iteration, sigma = DiffusionBlocks(settings, iterations).draw(random_of(range(samples)))
    assert iteration.shape == (samples,) and iteration.dtype == torch.int64
    assert sigma.shape == (samples, 1) and sigma.dtype == torch.float32
    iteration, sigma = iteration.numpy(), sigma[:, 0].double().numpy()
    pure = sigma == 80.0
    assert scipy.stats.binomtest(int(pure.sum()), samples, share).pvalue > 0.01
    assert pure.sum() in {0.0: [0], 1.0: [samples]}.get(share, range(1, samples))
    assert (iteration[pure] == 0).all()
    if share == 1.0:
        return
    assert set(iteration[~pure]) == set(range(iterations))
    if iterations > 1:
        assert scipy.stats.chisquare(np.bincount(iteration[~pure], minlength=iterations)).pvalue > 0.01
    for k in range(iterations):
        low, high = widened_interval(settings, k + 1, iterations)
        levels = sigma[~pure & (iteration == k)]
        assert (levels >= low * (1 - 1e-6)).all() and (levels <= high * (1 + 1e-6)).all()
        assert scipy.stats.kstest(np.log(levels), log_truncnorm(settings, low, high).cdf).pvalue > 0.001


def test_draws_belong_to_the_sample_and_not_to_its_place_in_a_batch(random_of):
    objective = DiffusionBlocks(NoiseSettings(), K)
    together = objective.draw(random_of(INDICES))
    for row, index in enumerate(INDICES):
        iteration, sigma = objective.draw(random_of([index]))
        assert iteration[0] == together[0][row] and sigma[0] == together[1][row]


def test_a_training_step_runs_prelude_core_and_coda_exactly_once(build_model, tokens, random_of, monkeypatch):
    model, calls = build_model(True), []
    for name in ("prelude", "iterate", "readout", "condition"):
        method = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, name=name, method=method: (calls.append(name), method(*args))[1])
    DiffusionBlocks(NoiseSettings(), 32)(model, tokens, random_of(INDICES)).value.backward()
    assert sorted(calls) == ["condition", "iterate", "prelude", "readout"]


@pytest.fixture
def sequence_losses(build_model, tokens, random_of, monkeypatch):
    """(noised targets' clean part y, losses [6, 8]) of one training pass, both in its graph."""
    model, seen = build_model(True), {}
    unit_embedding, token_losses = model.unit_embedding, diffusion_blocks_module.token_losses

    def remember(name, function):
        return lambda *args: seen.setdefault(name, function(*args))

    monkeypatch.setattr(model, "unit_embedding", remember("y", unit_embedding))
    monkeypatch.setattr(diffusion_blocks_module, "token_losses", remember("losses", token_losses))
    DiffusionBlocks(NoiseSettings(), K)(model, tokens, random_of(INDICES))
    return seen["y"], seen["losses"]


@pytest.mark.parametrize("row", range(6))
def test_a_sequences_loss_has_no_gradient_in_another_sequences_state(row, sequence_losses):
    y, losses = sequence_losses
    (gradient,) = torch.autograd.grad(losses[row].sum(), y)
    assert [(part != 0).any().item() for part in gradient] == [other == row for other in range(6)]


def test_a_batchs_gradient_is_the_mean_of_its_sequences_gradients(
    build_model, tokens, random_of, gradients, assert_same_gradients
):
    objective, model = DiffusionBlocks(NoiseSettings(), K), build_model(True)
    together = gradients(model, objective(model, tokens, random_of(INDICES)).value)
    alone = [
        gradients(model, objective(model, row.unsqueeze(0), random_of([index])).value) for row, index in zip(tokens, INDICES)
    ]
    assert_same_gradients(together, {name: torch.stack([part[name] for part in alone]).mean(0) for name in together})


def test_the_target_embeddings_are_trained_through_the_noised_state_too(build_model, tokens, random_of, monkeypatch, gradients):
    objective, model = DiffusionBlocks(NoiseSettings(share_at_sigma_max=0.0), K), build_model(True)
    whole = gradients(model, objective(model, tokens, random_of(INDICES)).value)["embedding.weight"]
    unit_embedding = model.unit_embedding
    monkeypatch.setattr(model, "unit_embedding", lambda ids: unit_embedding(ids).detach())
    without = gradients(model, objective(model, tokens, random_of(INDICES)).value)["embedding.weight"]
    assert not torch.allclose(whole, without, rtol=1e-3)


def test_next_token_logits_are_one_denoising_pass_over_noise_at_sigma_max(build_model, tokens, random_of):
    model, settings = build_model(True), NoiseSettings(sigma_max=40.0)
    logits = DiffusionBlocks(settings, K).next_token_logits(model, tokens[:, :-1], random_of(INDICES))
    for row, index in enumerate(INDICES):
        z = 40.0 * random_of([index]).normal(8, 32)[0].double()
        expected = denoise_by_hand(model, z, tokens[row, :-1], 40.0)
        torch.testing.assert_close(logits[row], expected, rtol=1e-3, atol=1e-4)


def test_held_out_nll_is_that_of_the_next_token_logits_of_the_inputs(build_model, tokens, random_of):
    objective, model = DiffusionBlocks(NoiseSettings(), K), build_model(True)
    nll = objective.held_out_nll(model, tokens, random_of(INDICES))
    logits = objective.next_token_logits(model, tokens[:, :-1], random_of(INDICES))
    assert nll.shape == (6, 8) and nll.dtype == torch.float32
    for row in range(6):
        np.testing.assert_allclose(nll[row].detach().numpy(), cross_entropies(logits[row], tokens[row, 1:]), rtol=1e-4)


def test_held_out_nll_reads_every_candidate_for_the_last_token_from_one_distribution(build_model, tokens, random_of):
    """Were the last target visible, the probabilities of all candidates would not sum to one, and earlier ones would move."""
    objective, model = DiffusionBlocks(NoiseSettings(), K), build_model(True)
    candidates = tokens[:1].repeat(50, 1)
    candidates[:, -1] = torch.arange(50)
    nll = torch.cat([objective.held_out_nll(model, row.unsqueeze(0), random_of([0])) for row in candidates])
    assert all(torch.equal(row[:-1], nll[0, :-1]) for row in nll)
    assert (-nll[:, -1].double()).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert nll[:, -1].std() > 0.1


def test_the_objective_is_built_by_name_with_its_noise_and_iterations():
    noise = NoiseSettings(share_at_sigma_max=0.7)
    objective = build_objective(ObjectiveSettings(), noise, 9)
    assert isinstance(objective, DiffusionBlocks)
    assert objective.model_fields == {"noise_conditioning": True}
    assert objective.settings is noise and objective.iterations == 9
