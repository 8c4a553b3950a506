"""Proves the denoising objective right: its loss against a recomputation of each sequence from the method's formulas, its draws
against scipy, that training is one pass which couples no iterations, and that held-out likelihood starts from noise alone."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from rdtrain.distributed import World
from rdtrain.model.information import LEVELS, UNIT
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import token_losses
from rdtrain.objectives import DiffusionBlocks, ObjectiveSettings, build_objective

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


def denoise_by_hand(model, z, inputs, sigma, sd=SIGMA_DATA):
    """Logits [T, V] of one sequence at levels sigma [1] or [T], EDM's scalings in float64; the readout is given the estimate over sd."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    total = (sigma**2 + sd**2).unsqueeze(-1)
    conditioning = model.condition((sigma.log() / 4).float().unsqueeze(0))
    core_input = (z / total.sqrt()).float()
    hidden = model.iterate(core_input.unsqueeze(0), model.prelude(inputs.unsqueeze(0)), conditioning)[0].double()
    estimate = sd**2 / total * z + sigma.unsqueeze(-1) * sd / total.sqrt() * hidden
    return model.readout((estimate / sd).float().unsqueeze(0), conditioning)[0]


def loss_by_hand(model, settings, sequence, random):
    """(iterations [1] or [T] counted from 0, their noise levels, losses [T]) of one sequence, with the objective's uniform and normal
    numbers."""
    iterations, sigmas = [], []
    for pure, which, where in random.uniform(8 if settings.level_per == "token" else 1, 3)[0].double().tolist():
        if pure < settings.share_at_sigma_max:
            iterations.append(0)
            sigmas.append(settings.sigma_max)
        else:
            iterations.append(int(which * K))
            sigmas.append(math.exp(log_truncnorm(settings, *widened_interval(settings, iterations[-1] + 1)).ppf(where)))
    eps = random.normal(8, 32)[0].double()
    rows = model.embedding.weight.detach().double()[sequence[1:]]
    y = rows / rows.square().sum(-1, keepdim=True).sqrt()
    z = y + torch.tensor(sigmas).unsqueeze(-1) * eps
    logits = denoise_by_hand(model, z, sequence[:-1], sigmas, settings.sigma_data or SIGMA_DATA)
    return np.array(iterations), np.array(sigmas), cross_entropies(logits, sequence[1:])


@pytest.mark.parametrize(
    "settings",
    [
        dict(share_at_sigma_max=0.0),
        dict(share_at_sigma_max=0.3),
        dict(share_at_sigma_max=1.0),
        dict(sigma_data=0.5),
        dict(weighting="edm", sigma_data=0.5),
        dict(weighting="edm", sigma_min=0.05),
        dict(level_per="token"),
        dict(level_per="token", weighting="edm", sigma_data=0.5),
    ],
    ids=str,
)
def test_the_loss_and_its_share_of_each_iteration_equal_a_recomputation_by_hand(settings, build_model, tokens, random_of):
    settings = NoiseSettings(**settings)
    model = build_model(True, norm_eps=0.1)  # so large that the readout's norm does not hide the scale of what it is given
    objective = DiffusionBlocks(settings, K)
    loss = objective(model, tokens, random_of(INDICES))
    by_hand = [loss_by_hand(model, settings, row, random_of([index])) for row, index in zip(tokens, INDICES)]
    iterations, sigmas, losses = (
        np.stack([np.broadcast_to(values, (8,)) for values in of_rows]) for of_rows in zip(*by_hand)
    )
    sd = settings.sigma_data or SIGMA_DATA
    weights = (sigmas**2 + sd**2) / (sigmas * sd) ** 2 if settings.weighting == "edm" else 1.0
    assert loss.value.item() == pytest.approx((weights * losses).mean(), rel=1e-4)
    assert loss.value.requires_grad
    assert set(loss.metrics) == {"loss", "loss_by_iteration", "loss_by_noise_level"}
    total, count = loss.metrics["loss"]
    assert not total.requires_grad and total.item() / count.item() == pytest.approx(losses.mean(), rel=1e-4)
    sums, counts = loss.metrics["loss_by_iteration"]
    assert not sums.requires_grad and not counts.requires_grad
    assert sums.shape == counts.shape == (K,)
    for iteration in range(K):
        of_iteration = losses[iterations == iteration]
        assert counts[iteration] == len(of_iteration)
        assert sums[iteration].item() == pytest.approx(of_iteration.sum(), rel=1e-4)
    edges = np.geomspace(settings.sigma_min, settings.sigma_max, 17)
    sums, counts = loss.metrics["loss_by_noise_level"]
    of_bin = np.digitize(sigmas, edges[1:-1]).ravel()
    assert (counts.numpy() == np.bincount(of_bin, minlength=16)).all()
    np.testing.assert_allclose(sums.numpy(), np.bincount(of_bin, losses.ravel(), 16), rtol=1e-4, atol=1e-5)
    # The information curve counts each token at the point nearest to its level.
    points = np.linspace(math.log(settings.sigma_min), math.log(settings.sigma_max), LEVELS)
    nearest = np.abs(np.log(sigmas)[..., None] - points).argmin(-1)
    units, seen = objective.information.pending.numpy()
    assert (seen * UNIT == np.bincount(nearest.ravel(), minlength=LEVELS)).all()
    np.testing.assert_allclose(units * UNIT, np.bincount(nearest.ravel(), losses.ravel(), LEVELS), rtol=1e-4, atol=1e-5)


def test_metrics_of_micro_batches_add_up_to_those_of_the_batch(build_model, tokens, random_of):
    objective, model = DiffusionBlocks(NoiseSettings(), K), build_model(True)
    whole = objective(model, tokens, random_of(INDICES)).metrics
    parts = [objective(model, tokens[rows], random_of(INDICES[rows])).metrics for rows in (slice(0, 2), slice(2, 6))]
    for name, expected in whole.items():
        for kind in (0, 1):
            torch.testing.assert_close(parts[0][name][kind] + parts[1][name][kind], expected[kind], rtol=1e-4, atol=1e-5)


def test_the_recomputed_batch_has_more_than_one_iteration_and_both_kinds_of_sequence(random_of):
    iteration, sigma = DiffusionBlocks(NoiseSettings(), K).draw(random_of(INDICES), 8)
    assert len(set(iteration.flatten().tolist())) >= 3
    assert 1 <= (sigma == 80.0).sum() < 6


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("iterations", [1, 8])
def test_draws_have_uniform_iterations_the_set_share_of_pure_noise_and_levels_of_their_interval(share, iterations, random_of):
    settings, samples = NoiseSettings(share_at_sigma_max=share), 4000
    iteration, sigma = DiffusionBlocks(settings, iterations).draw(random_of(range(samples)), 8)
    assert iteration.shape == (samples, 1) and iteration.dtype == torch.int64
    assert sigma.shape == (samples, 1) and sigma.dtype == torch.float32
    iteration, sigma = iteration[:, 0].numpy(), sigma[:, 0].double().numpy()
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


def test_each_token_draws_its_own_iteration_and_level_and_is_pure_noise_with_the_set_share(random_of):
    settings = NoiseSettings(level_per="token", partition="uniform", share_at_sigma_max=0.3)
    iteration, sigma = DiffusionBlocks(settings, K).draw(random_of(range(40)), 100)
    assert iteration.shape == sigma.shape == (40, 100)
    pure = sigma == 80.0
    assert scipy.stats.binomtest(int(pure.sum()), 4000, 0.3).pvalue > 0.01
    assert pure.any(1).all() and not pure.all(1).any(), "pure noise is a matter of the token"
    assert scipy.stats.chisquare(iteration[~pure].bincount(minlength=K).numpy()).pvalue > 0.01
    edges = np.geomspace(80, 0.002, K + 1)
    for k in range(K):
        levels, a = sigma[~pure & (iteration == k)].double().numpy(), (edges[0] / edges[1]) ** 0.1
        low, high = max(edges[k + 1] / a, 0.002), min(edges[k] * a, 80.0)
        assert (levels >= low * (1 - 1e-6)).all() and (levels <= high * (1 + 1e-6)).all()
        assert scipy.stats.kstest(np.log(levels), log_truncnorm(settings, low, high).cdf).pvalue > 0.001


@pytest.mark.parametrize("level_per", ["sequence", "token"])
def test_draws_belong_to_the_sample_and_not_to_its_place_in_a_batch(random_of, level_per):
    objective = DiffusionBlocks(NoiseSettings(level_per=level_per), K)
    together = objective.draw(random_of(INDICES), 8)
    for row, index in enumerate(INDICES):
        iteration, sigma = objective.draw(random_of([index]), 8)
        assert torch.equal(iteration[0], together[0][row]) and torch.equal(sigma[0], together[1][row])


def test_equal_information_divides_by_what_was_learned_every_sixteen_steps_and_goes_on_from_a_checkpoint(build_model, tokens, random_of):
    """Interrupted = uninterrupted, with the checkpoint between two updates; the intervals are those of the curve by then."""
    settings, model, world = NoiseSettings(partition="equal_information"), build_model(True), World.from_environment()

    def run(objective, steps):
        for step in steps:
            objective(model, tokens, random_of(INDICES, seed=step))
            objective.after_step(step + 1, world)
        return objective

    whole, first = run(DiffusionBlocks(settings, K), range(40)), run(DiffusionBlocks(settings, K), range(21))
    state = json.loads(json.dumps(first.state(world)))
    assert sum(state["pending"][1]) * UNIT == 5 * tokens[:, 1:].numel()
    resumed = DiffusionBlocks(settings, K)
    resumed.load_state(state, world)
    for ours, theirs in zip(resumed.draw(random_of(INDICES), 8), first.draw(random_of(INDICES), 8)):
        assert torch.equal(ours, theirs)
    run(resumed, range(21, 40))
    assert resumed.state(world) == whole.state(world)
    assert resumed.noise.levels(7) == whole.noise.levels(7) != DiffusionBlocks(settings, K).noise.levels(7)
    expected = [whole.information.curve.equal_edges(K)[k] for k in (1, 2)]
    assert [whole.noise.levels(K)[k] for k in (1, 2)] == expected
    _, sigma = whole.draw(random_of(range(500)), 8)
    for k in range(K):
        low, high = whole.noise.intervals(K)[k]
        drawn = sigma[whole.draw(random_of(range(500)), 8)[0] == k]
        drawn = drawn[drawn < 80.0]
        assert low <= drawn.min() * (1 + 1e-6) and drawn.max() <= high * (1 + 1e-6)


def test_a_training_step_runs_prelude_core_and_coda_exactly_once(build_model, tokens, random_of, monkeypatch):
    model, calls = build_model(True), []
    for name in ("prelude", "iterate", "coda", "condition"):
        method = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, name=name, method=method: (calls.append(name), method(*args))[1])
    DiffusionBlocks(NoiseSettings(), 32)(model, tokens, random_of(INDICES)).value.backward()
    assert sorted(calls) == ["coda", "condition", "iterate", "prelude"]


@pytest.fixture
def sequence_losses(build_model, tokens, random_of, monkeypatch):
    """(noised targets' clean part y, losses [6, 8] of the state that the loss is taken of) of one training pass, both in its graph."""
    model, seen = build_model(True), {}
    unit_embedding, loss = model.unit_embedding, model.loss

    def remember_loss(state, targets, conditioning, evidence, weights, mask):
        seen["losses"] = token_losses(model.readout(state, conditioning, None, evidence), targets)
        return loss(state, targets, conditioning, evidence, weights, mask)

    monkeypatch.setattr(model, "unit_embedding", lambda ids: seen.setdefault("y", unit_embedding(ids)))
    monkeypatch.setattr(model, "loss", remember_loss)
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
        expected = denoise_by_hand(model, z, tokens[row, :-1], [40.0])
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
    objective = build_objective(ObjectiveSettings(), noise, 9, 3)
    assert isinstance(objective, DiffusionBlocks)
    assert objective.model_fields["noise_conditioning"] is True
    assert objective.settings is noise and objective.iterations == 9 and objective.blocks == 3
