"""Proves self-conditioning, training on the chain's own states and the core readout right: losses and gradients against a slow
computation of each sequence in float64, which treats what the earlier iteration says as a constant."""

import copy
import math

import pytest
import torch

from rdtrain.model.layers import run_layers
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks, ObjectiveSettings

K = 4
INDICES = [11, 2, 8, 40, 6, 21]
ALL = ("self_conditioning", "chain_states", "core_readout")
SIGMA_DATA = 1 / math.sqrt(32)

CASES = pytest.mark.parametrize(
    "settings, noise, blocks",
    [
        (ALL[:1], {}, 1),
        (ALL[1:2], {"share_at_sigma_max": 0.0}, 1),
        (ALL[2:], {"weighting": "edm", "sigma_min": 0.05}, 1),
        (ALL, {}, 1),
        (("posterior_readout",), {"sigma_min": 0.05}, 1),
        (("wiener_input",), {"sigma_data": 0.5}, 1),
        (("posterior_readout", "wiener_input", *ALL), {"sigma_min": 0.05, "level_per": "token"}, 2),
        (("posterior_readout", "optional_state", *ALL), {"sigma_min": 0.05}, 1),
        (ALL, {"overlap": 1.0, "share_at_sigma_max": 0.0}, 1),  # so wide that the level before would fall below the level
        (ALL, {"level_per": "token"}, 1),
        (ALL, {"share_at_sigma_max": 0.0, "sigma_data": 0.5}, 2),
        (ALL, {"level_per": "token", "weighting": "edm", "sigma_min": 0.05}, 2),
    ],
    ids=str,
)


def build(settings, noise, blocks, build_model):
    off = dict.fromkeys(("posterior_readout", "wiener_input", "optional_state"), False)
    chosen = ObjectiveSettings(**off | dict.fromkeys(settings, True))
    objective = DiffusionBlocks(NoiseSettings(**noise), K, chosen, blocks)
    # so large an epsilon that the readout's norm does not hide the scale of what it is given
    return objective, build_model(blocks=blocks, norm_eps=0.1, **objective.model_fields)


def level_before(objective, iteration, sigma, first):
    """Iterations counted from 0: the level as far up the interval of the one before, in ln sigma; none is before a block's first."""
    if iteration == first:
        return sigma
    (low, high), (low_before, high_before) = (objective.noise.intervals(K)[k] for k in (iteration, iteration - 1))
    place = math.log(sigma / low) / math.log(high / low)
    return max(sigma, low_before * (high_before / low_before) ** place)


def unit_rows(model):
    rows = model.embedding.weight
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def estimate_by_hand(model, core, z, e, levels, told, sd):
    """D / sd [T, d] of one sequence, or with optional_state the core's output, and the conditioning, the scalings and the adapter written
    out; told [T, d] is an embedding."""
    total = levels**2 + sd**2
    conditioning = model.condition(levels.log().T / 4)
    scaled = sd / total * z if model.config.wiener_input else z / total.sqrt()
    x = torch.cat((scaled, e), dim=-1) @ core.adapter.weight.T
    if told is not None:
        x = x + told / (1 / math.sqrt(model.config.width)) @ model.estimate_adapter.weight.T
    hidden = run_layers(model.rotary, core.layers, x.unsqueeze(0), conditioning, None)[0]
    if model.config.optional_state:
        return hidden, conditioning
    return (sd**2 / total * z + levels * sd / total.sqrt() * hidden) / sd, conditioning


def evidence_by_hand(model, z, levels):
    """ln N(z; y_x, sigma^2) of each token x, of length one, up to a constant [T, V], without gradient; 0 for a model that leaves it out."""
    return (z @ unit_rows(model).T / levels**2).detach() * model.config.posterior_readout


def cross_entropies(logits, targets):
    return torch.stack([row.logsumexp(-1) - row[target] for row, target in zip(logits, targets.tolist())])


def losses_by_hand(model, objective, sequence, random):
    """(losses [T], their weights, losses of the core readout [T] or 0) of one sequence, in the graph of a float64 model."""
    iteration, sigma = objective.draw(random, 8)
    eps, inputs, targets = random.normal(8, 32)[0].double(), sequence[:-1], sequence[1:]
    served, sd = K // objective.blocks, objective.settings.sigma_data or SIGMA_DATA
    block = int(iteration.flatten()[0]) // served
    iterations, sigmas = iteration[0].tolist(), sigma[0].tolist()
    levels = torch.tensor(sigmas, dtype=torch.float64).unsqueeze(-1)
    core, y, e = model.cores[block], unit_rows(model)[targets], model.prelude(inputs.unsqueeze(0))[0]
    z, told = y + levels * eps, None
    if random.indices[0] % 2 == 0 and (objective.self_conditioning or objective.chain_states):
        before = levels
        if objective.chain_states:
            falling = [level_before(objective, k, s, block * served) for k, s in zip(iterations, sigmas)]
            before = torch.tensor(falling, dtype=torch.float64).unsqueeze(-1)
        start = y + before * eps
        state, conditioning = estimate_by_hand(model, core, start, e, before, None, sd)
        logits = model.readout(state.unsqueeze(0), conditioning)[0] + evidence_by_hand(model, start, before)
        probability = logits.softmax(-1)
        expected = sum(probability[:, token, None] * unit_rows(model)[token] for token in range(50))
        if objective.chain_states:
            z = (start + (levels - before) / before * (start - expected)).detach()
        if objective.self_conditioning:
            told = expected.detach()
    state, conditioning = estimate_by_hand(model, core, z, e, levels, told, sd)
    evidence = evidence_by_hand(model, z, levels)
    losses = cross_entropies(model.readout(state.unsqueeze(0), conditioning)[0] + evidence, targets)
    weights = ((levels**2 + sd**2) / (levels * sd) ** 2)[:, 0] if objective.settings.weighting == "edm" else torch.ones(1)
    second = torch.zeros(8)
    if objective.core_readout:
        normed = state / (state.square().mean(-1, keepdim=True) + 0.1).sqrt() * model.core_norm.weight
        second = cross_entropies(model.core_scale * normed @ model.embedding.weight.T + evidence, targets)
    return losses, weights, second


@CASES
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradient_equal_a_slow_computation_of_each_sequence(
    seed, settings, noise, blocks, build_model, tokens, random_of, gradients
):
    objective, model = build(settings, noise, blocks, build_model)
    loss = objective(model, tokens, random_of(INDICES, seed))
    slow = copy.deepcopy(model).double()
    rows = [losses_by_hand(slow, objective, row, random_of([index], seed)) for row, index in zip(tokens, INDICES)]
    value = torch.stack([(weights * losses + second).mean() for losses, weights, second in rows]).mean()
    assert loss.value.item() == pytest.approx(value.item(), rel=1e-4)
    total, count = loss.metrics["loss"]
    assert total.item() / count.item() == pytest.approx(torch.stack([row[0] for row in rows]).mean().item(), rel=1e-4)
    expected = gradients(slow, value)
    for name, gradient in gradients(model, loss.value).items():
        difference = (gradient - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9)
        assert difference < 2e-3, f"{name}: {difference:.1e}"
    for name in ("estimate_adapter.weight",) * objective.self_conditioning + ("core_norm.weight",) * objective.core_readout:
        assert expected[name].abs().max() > 1e-4


def test_the_recomputed_sequences_have_iterations_before_theirs(random_of):
    for blocks in (1, 2):
        objective = DiffusionBlocks(NoiseSettings(share_at_sigma_max=0.0), K, blocks=blocks)
        drawn = [objective.draw(random_of([2, 8, 40, 6], seed), 8)[0] for seed in range(2)]
        assert {int(k) % (K // blocks) > 0 for iteration in drawn for k in iteration} == {False, True}
        assert blocks == 1 or {int(iteration[0]) // 2 for iteration in drawn} == {0, 1}


@CASES
def test_the_loss_and_its_gradient_do_not_depend_on_how_samples_are_grouped(
    settings, noise, blocks, build_model, tokens, random_of, gradients
):
    """Among the groups are one of odd samples alone, where nothing is told, and one of even samples alone."""
    objective, model = build(settings, noise, blocks, build_model)
    whole = objective(model, tokens, random_of(INDICES)).value
    groups = [[0, 5], [1, 2, 3], [4]]
    parts = [objective(model, tokens[rows], random_of([INDICES[row] for row in rows])).value for rows in groups]
    together = sum(len(rows) * part for rows, part in zip(groups, parts)) / 6
    assert together.item() == pytest.approx(whole.item(), rel=1e-5)
    expected = gradients(model, whole)
    for name, gradient in gradients(model, together).items():
        assert (gradient - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name


def test_every_micro_batch_has_a_gradient_for_what_takes_the_estimate_even_if_nobody_is_told_one(build_model, tokens, random_of):
    """Ranks of a sharding engine that had gradients for other parameters than their neighbours would add up what does not belong."""
    objective, model = build(ALL[:1], {}, 1, build_model)
    objective(model, tokens[:2], random_of([1, 3])).value.backward()
    assert model.estimate_adapter.weight.grad is not None and (model.estimate_adapter.weight.grad == 0).all()


def test_at_the_start_a_told_estimate_changes_nothing_and_is_about_to(build_model, tokens, random_of, gradients):
    objective = DiffusionBlocks(NoiseSettings(), K, ObjectiveSettings(self_conditioning=True))
    model = build_model(perturbed=False, **objective.model_fields)
    told = objective(model, tokens, random_of(INDICES)).value
    assert torch.equal(told, DiffusionBlocks(NoiseSettings(), K)(model, tokens, random_of(INDICES)).value)
    assert gradients(model, told)["estimate_adapter.weight"].abs().max() > 0


def test_the_estimate_is_fp32_under_autocast_too(build_model, random_of, tokens):
    """It is put into fp32 tensors, by operations that autocast leaves alone on CUDA."""
    model = build_model(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.expected_embedding(torch.randn(2, 3, 50)).dtype == torch.float32
