"""Proves the operation counts right against torch's FlopCounterMode, which counts the operations that are really run.

The counter does not know the CPU's own flash kernel, so SDPA is held to its `math` backend. Its counts then equal ours exactly,
with one difference, which a test states: the noise embedding's input needs no gradient, but is counted as if it did.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rdtrain.flops import forward_flops
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks, ObjectiveSettings
from rdtrain.objectives.bptt import BackpropagationThroughTime
from rdtrain.objectives.one_pass import OnePass

TRIALS = ["posterior_readout", "self_conditioning", "chain_states", "core_readout"]
SHAPES = pytest.mark.parametrize(
    "batch, length, changes",
    [
        (1, 1, {}),
        (2, 8, {}),
        (3, 40, {"core_layers": 3, "coda_layers": 2, "prelude_layers": 1}),
        (2, 8, {"width": 64, "mlp_width": 24, "heads": 2, "vocab_size": 90}),
    ],
)


def counted(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ids(batch, length):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(0))


@SHAPES
def test_forward_counts_of_a_model_without_noise_levels_are_exact(batch, length, changes, build_model):
    model = build_model(False, **changes)
    per_token, state = forward_flops(model.config, length), torch.randn(batch, length, model.config.width)
    assert counted(lambda: model.prelude(ids(batch, length))) == per_token.prelude * batch * length
    assert counted(lambda: model.iterate(state, state)) == per_token.iterate * batch * length
    assert counted(lambda: model.readout(state)) == per_token.readout * batch * length
    assert per_token.condition == 0


@SHAPES
def test_forward_counts_of_a_model_with_noise_levels_are_exact(batch, length, changes, build_model):
    model = build_model(True, **changes)
    per_token, state = forward_flops(model.config, length), torch.randn(batch, length, model.config.width)
    conditioning = model.condition(torch.zeros(batch, 1))
    assert counted(lambda: model.prelude(ids(batch, length))) == per_token.prelude * batch * length
    with_modulation = counted(lambda: model.iterate(state, state, conditioning))
    with_modulation += counted(lambda: model.readout(state, conditioning))
    with_modulation += counted(lambda: model.condition(torch.zeros(batch, 1)))
    expected = (per_token.iterate + per_token.readout + per_token.condition) * batch * length
    assert with_modulation == pytest.approx(expected, rel=1e-12)  # condition is a fraction of a sequence's


@SHAPES
@pytest.mark.parametrize("free, trained", [(0, 4), (3, 2), (3, 1)], ids=["full", "truncated", "local"])
def test_training_counts_of_backpropagation_through_time_are_exact_and_free_iterations_count_once(
    free, trained, batch, length, changes, build_model, random_of, fixed_depth
):
    model, objective = build_model(False, **changes), fixed_depth(free + trained, trained)
    tokens = ids(batch, length + 1)
    actual = counted(lambda: objective(model, tokens, random_of(range(batch))).value.backward())
    assert objective.training_flops(model.config, length) * batch * length == actual


def test_what_activation_checkpointing_computes_again_is_run_but_not_counted(build_model, random_of, fixed_depth):
    model, tokens = build_model(False), ids(2, 9)
    plain, checkpointed = fixed_depth(5, 3), fixed_depth(5, 3, activation_checkpointing=True)
    assert checkpointed.training_flops(model.config, 8) == plain.training_flops(model.config, 8)
    actual = counted(lambda: checkpointed(model, tokens, random_of(range(2))).value.backward())
    assert plain.recomputed_flops(model.config, 8) == 0
    assert actual == (plain.training_flops(model.config, 8) + checkpointed.recomputed_flops(model.config, 8)) * 2 * 8


@pytest.mark.parametrize(
    "how, interval, kind",
    [
        *itertools.product(("selective", "full"), (1, 3), ("blocks", "one level a token")),
        *itertools.product(("full",), (1, 2, 3), ("bptt", "checkpointed bptt")),
        ("selective", 1, "bptt"),
    ],
)
def test_what_checkpointed_layers_compute_again_is_run_but_not_counted(how, interval, kind, build_model, random_of, fixed_depth):
    """With interval 2 one layer of each part, and an iteration's last is not among them; with 3 that and the first of all."""
    unrolled, layers = kind.endswith("bptt"), {"prelude_layers": 1, "core_layers": 3, "coda_layers": 2}
    model = build_model(not unrolled, **layers)
    if unrolled:
        objective = fixed_depth(5, 3, activation_checkpointing=kind != "bptt")
    else:
        objective = DiffusionBlocks(NoiseSettings(level_per="token" if "token" in kind else "sequence"), 4)
    objective.layer_checkpointing_interval = interval
    counts, tokens = [], ids(2, 9)
    for objective.layer_checkpointing in ("none", how):
        model.checkpoint_layers(objective.layer_checkpointing, interval)
        run = counted(lambda: objective(model, tokens, random_of(range(2))).value.backward())
        counts.append((run, objective.recomputed_flops(model.config, 8) * 2 * 8))
    (plain, before), (actual, after) = counts
    assert actual - plain == pytest.approx(after - before, rel=1e-12)
    assert (after > before) == (how == "full" or not unrolled), "without noise levels, `selective` computes no product again"


@pytest.mark.parametrize("settings, limit", [({}, 8), ({"gradient": "full"}, math.inf), ({"gradient": "local"}, 1)])
@pytest.mark.parametrize("iterations", [4, 32])
def test_training_counts_of_a_drawn_depth_are_its_mean(settings, limit, iterations, build_model, fixed_depth):
    """Against fixed depths, whose counts are exact, drawn here by numpy."""
    config, random = build_model(False).config, np.random.default_rng(0)
    depths = random.poisson(random.lognormal(np.log(iterations) - 1 / 8, 0.5, 200_000)) + 1
    values, counts = np.unique(depths, return_counts=True)
    costs = [fixed_depth(int(depth), int(min(depth, limit))).training_flops(config, 16) for depth in values]
    mean = np.average(costs, weights=counts)
    error = math.sqrt(np.average((costs - mean) ** 2, weights=counts) / depths.size)
    drawn = BackpropagationThroughTime(ObjectiveSettings("bptt", **settings), iterations)
    assert drawn.training_flops(config, 16) == pytest.approx(mean, abs=4 * error)
    assert 4 * error < 0.01 * mean


@SHAPES
def test_training_counts_of_one_pass_are_exact(batch, length, changes, build_model, random_of):
    model, objective = build_model(False, iterations=1, **changes), OnePass(1)
    actual = counted(lambda: objective(model, ids(batch, length + 1), random_of(range(batch))).value.backward())
    assert objective.training_flops(model.config, length) * batch * length == actual


@SHAPES
@pytest.mark.parametrize("level_per", ["sequence", "token"])
def test_training_counts_of_diffusion_blocks_are_exact_but_for_one_gradient_that_nobody_needs(
    level_per, batch, length, changes, build_model, random_of
):
    model, objective = build_model(True, **changes), DiffusionBlocks(NoiseSettings(level_per=level_per), 4)
    tokens = ids(batch, length + 1)
    actual = counted(lambda: objective(model, tokens, random_of(range(batch))).value.backward())
    levels = batch * (length if level_per == "token" else 1)
    unneeded = 2 * 128 * 128 * levels  # the gradient of the noise embedding's sine and cosine features
    expected = objective.training_flops(model.config, length) * batch * length
    assert expected - unneeded == pytest.approx(actual, rel=1e-12)


@pytest.mark.parametrize("settings", [[name] for name in TRIALS] + [TRIALS])
@pytest.mark.parametrize("level_per", ["sequence", "token"])
def test_training_counts_with_an_iteration_before_and_a_core_readout_are_exact_but_for_that_gradient(
    level_per, settings, build_model, random_of
):
    """Every second of the four sequences goes through the iteration before."""
    chosen = ObjectiveSettings(**{"posterior_readout": False, "optional_state": False} | dict.fromkeys(settings, True))
    objective = DiffusionBlocks(NoiseSettings(level_per=level_per), 4, chosen)
    model = build_model(core_layers=3, **objective.model_fields)
    actual = counted(lambda: objective(model, ids(4, 9), random_of(range(4))).value.backward())
    unneeded = 2 * 128 * 128 * 4 * (8 if level_per == "token" else 1)
    assert objective.training_flops(model.config, 8) * 4 * 8 - unneeded == pytest.approx(actual, rel=1e-12)


def test_idle_blocks_cost_nothing(build_model, random_of):
    model, objective = build_model(True, blocks=2), DiffusionBlocks(NoiseSettings(), 4, blocks=2)
    actual = counted(lambda: objective(model, ids(3, 9), random_of(range(3))).value.backward())
    assert objective.training_flops(model.config, 8) * 3 * 8 - 2 * 128 * 128 * 3 == pytest.approx(actual, rel=1e-12)


def test_the_unneeded_gradient_is_nothing_at_the_size_of_a_real_run(build_model):
    with torch.device("meta"):
        config = build_model(True, width=512, heads=8, mlp_width=1536, core_layers=4, vocab_size=8192).config
    per_token = DiffusionBlocks(NoiseSettings(), 32).training_flops(config, 512)
    assert 2 * 128 * 128 / 512 / per_token < 1e-6
