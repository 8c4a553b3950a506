"""Proves backpropagation through time right: loss and every gradient against autograd on a loop that is unrolled by hand, layer
by layer, with explicit detaching; that free iterations carry no gradient; that activation checkpointing changes nothing; that
held-out likelihood runs all K iterations."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from rdtrain.errors import UserError
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.objectives.bptt import BackpropagationThroughTime
from rdtrain.randomness import SampleRandom

INDICES = [11, 3, 8, 40, 5, 21]
CASES = pytest.mark.parametrize(
    "settings, free, trained",
    [({"gradient": "truncated", "trained_iterations": 2}, 3, 2), ({"gradient": "full"}, 0, 5), ({"gradient": "local"}, 4, 1)],
    ids=["truncated", "full", "local"],
)


def objective_of(iterations=5, depth="fixed", **settings):
    return BackpropagationThroughTime(ObjectiveSettings("bptt", depth=depth, **settings), iterations)


def poisson_step(objective, low, high):
    """A step whose depth lies in [low, high]."""
    return next(step for step in range(1000) if low <= objective.depth.draw(SampleRandom(5, [], "cpu", step).of_step()) <= high)


def rotary_by_hand(length):
    """Cosines and sines [T, D/2] of heads of eight channels."""
    angle = np.arange(length)[:, None] * 50_000.0 ** (-2 * np.arange(4) / 8)
    return torch.tensor(np.cos(angle)).float(), torch.tensor(np.sin(angle)).float()


def state_by_hand(random, length):
    """Normal numbers of deviation sqrt(2/5), truncated at three deviations, by scipy."""
    uniform = random.uniform(length, 32).double().numpy()
    return torch.tensor(scipy.stats.truncnorm(-3, 3, scale=math.sqrt(2 / 5)).ppf(uniform)).float()


def logits_by_hand(model, inputs, random, free, trained):
    """Every layer called in turn. After each free iteration the state is cut from its past; e keeps its gradient, but reaches the
    loss only through the trained iterations."""
    rotary = rotary_by_hand(inputs.shape[1])
    e = F.embedding(inputs, model.embedding.weight) * math.sqrt(32)
    for layer in model.prelude_layers:
        e = layer(e, rotary)
    state = state_by_hand(random, inputs.shape[1])
    for iteration in range(free + trained):
        state = state @ model.cores[0].adapter.weight[:, :32].T + e @ model.cores[0].adapter.weight[:, 32:].T
        for layer in model.cores[0].layers:
            state = layer(state, rotary)
        if iteration < free:
            state = state.detach()
    x = model.final_norm(state)
    for layer in model.coda_layers:
        x = layer(x, rotary)
    return model.final_norm(x) @ model.embedding.weight.T


def loss_by_hand(model, tokens, random, free, trained):
    logits = logits_by_hand(model, tokens[:, :-1], random, free, trained)
    chosen = torch.stack([logits[:, i].gather(-1, tokens[:, i + 1 : i + 2])[:, 0] for i in range(8)], dim=1)
    return (logits.logsumexp(-1) - chosen).mean()


@CASES
@pytest.mark.parametrize("depth", ["fixed", "poisson"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_loss_and_every_gradient_equal_those_of_the_loop_unrolled_by_hand(
    settings, free, trained, depth, activation_checkpointing, build_model, tokens, random_of, gradients, assert_same_gradients
):
    model, objective = build_model(False), objective_of(depth=depth, activation_checkpointing=activation_checkpointing, **settings)
    random = random_of(INDICES)
    if depth == "poisson":
        step = poisson_step(objective, 4, 8)
        random = random_of(INDICES, step=step)
        free = objective.depth.draw(random.of_step()) - trained
        if settings["gradient"] == "full":
            free, trained = 0, free + trained
    loss = objective(model, tokens, random)
    expected = loss_by_hand(model, tokens, random_of(INDICES), free, trained)
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(loss.metrics) == ["loss", "depth"]
    total, count = loss.metrics["loss"]
    assert not total.requires_grad and total.item() / count.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [number.item() for number in loss.metrics["depth"]] == [free + trained, 1]
    assert_same_gradients(gradients(model, loss.value), gradients(model, expected))


def test_a_drawn_depth_below_the_trained_iterations_is_trained_in_full(
    build_model, tokens, random_of, gradients, assert_same_gradients
):
    model, objective = build_model(False), objective_of(4, "poisson")
    step = poisson_step(objective, 2, 2)
    actual = gradients(model, objective(model, tokens, random_of(INDICES, step=step)).value)
    assert_same_gradients(actual, gradients(model, loss_by_hand(model, tokens, random_of(INDICES), 0, 2)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_gives_the_same_gradients_and_recomputes_the_trained_iterations_alone(
    precision, build_model, tokens, random_of, gradients
):
    model, calls, found = build_model(False), [], []
    handle = model.cores[0].layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for activation_checkpointing in (False, True):
        objective = objective_of(trained_iterations=3, activation_checkpointing=activation_checkpointing)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(model, tokens, random_of(INDICES)).value
        assert calls == [False] * 2 + [True] * 3
        found.append(gradients(model, loss))
        assert len(calls) == (5 if not activation_checkpointing else 8)
        calls.clear()
    handle.remove()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-7)


def relative_difference(first, second):
    return ((first - second).norm() / second.norm()).item()


def test_free_iterations_change_the_loss_but_carry_no_gradient(fixed_depth, build_model, tokens, random_of, gradients):
    model = build_model(False)
    full, truncated, local, shallow = (
        fixed_depth(depth, trained)(model, tokens, random_of(INDICES)).value
        for depth, trained in ((4, 4), (4, 2), (4, 1), (1, 1))
    )
    assert full.item() == pytest.approx(truncated.item(), rel=1e-6)
    assert full.item() == pytest.approx(local.item(), rel=1e-6)
    assert abs(full.item() - shallow.item()) > 1e-4
    full, truncated, local = (gradients(model, loss) for loss in (full, truncated, local))
    for name in full:
        if name.startswith(("cores", "prelude_layers")):
            assert relative_difference(truncated[name], full[name]) > 0.001, name
            assert relative_difference(local[name], truncated[name]) > 0.001, name
        elif name.startswith("coda_layers"):
            assert relative_difference(local[name], full[name]) < 1e-4, name


def test_the_prelude_is_trained_even_when_only_the_last_iteration_is(fixed_depth, build_model, tokens, random_of, gradients):
    model = build_model(False)
    found = gradients(model, fixed_depth(4, 1)(model, tokens, random_of(INDICES)).value)
    assert all((gradient != 0).any() for gradient in found.values())


def test_the_number_of_core_calls_with_and_without_gradient_is_as_set(fixed_depth, build_model, tokens, random_of, monkeypatch):
    model, calls = build_model(False), []
    iterate = model.iterate
    monkeypatch.setattr(model, "iterate", lambda *args, **named: (calls.append(torch.is_grad_enabled()), iterate(*args, **named))[1])
    fixed_depth(5, 2)(model, tokens, random_of(INDICES))
    assert calls == [False] * 3 + [True] * 2


def test_gradients_survive_autocast_although_free_iterations_fill_its_weight_cache(fixed_depth, build_model, tokens, random_of, gradients):
    """Weights cast to bf16 without gradient and then reused from autocast's cache would be trained no more."""
    model, objective = build_model(False), fixed_depth(4, 1)
    expected = gradients(model, objective(model, tokens, random_of(INDICES)).value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(model, tokens, random_of(INDICES)).value
    for name, gradient in gradients(model, loss).items():
        assert relative_difference(gradient, expected[name]) < 0.1, name


def test_the_initial_state_is_a_function_of_the_samples_index(fixed_depth, build_model, tokens, random_of):
    objective, model = fixed_depth(2, 1), build_model(False)
    losses = [objective(model, row.unsqueeze(0), random_of([index])).value.item() for row, index in zip(tokens, INDICES)]
    order = [4, 0, 5, 2, 1, 3]
    shuffled = objective(model, tokens[order], random_of([INDICES[i] for i in order])).value.item()
    assert shuffled == pytest.approx(np.mean(losses), rel=1e-5)
    others = [objective(model, row.unsqueeze(0), random_of([index + 1])).value.item() for row, index in zip(tokens, INDICES)]
    assert all(abs(first - second) > 1e-5 for first, second in zip(losses, others))


@pytest.mark.parametrize("iterations, depth", [(1, "poisson"), (5, "poisson"), (8, "fixed")])
def test_held_out_nll_runs_all_iterations_of_inference_whatever_was_trained(iterations, depth, build_model, tokens, random_of):
    model = build_model(False)
    nll = objective_of(iterations, depth).held_out_nll(model, tokens, random_of(INDICES))
    logits = logits_by_hand(model, tokens[:, :-1], random_of(INDICES), 0, iterations).double()
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert nll.shape == (6, 8) and nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-4, atol=1e-5)


def test_one_and_five_iterations_of_inference_differ(build_model, tokens, random_of):
    model = build_model(False)
    one, five = (objective_of(k, "poisson").held_out_nll(model, tokens, random_of(INDICES)) for k in (1, 5))
    assert (one - five).abs().max() > 1e-3


def test_the_objective_is_built_by_name_with_its_iterations():
    objective = build_objective(ObjectiveSettings("bptt", trained_iterations=2), NoiseSettings(), 9)
    assert isinstance(objective, BackpropagationThroughTime) and objective.model_fields == {}
    assert (objective.depth.mean, objective.trained_limit, objective.iterations) == (10, 2, 9)
    full = build_objective(ObjectiveSettings("bptt", gradient="full", depth="fixed"), NoiseSettings(), 9)
    assert (full.depth.mean, full.trained_limit) == (9, math.inf)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": "bptt", "trained_iterations": 0}, "trained_iterations must be at least 1, and it is 0"),
        ({"name": "bptt", "trained_iterations": 2, "gradient": "local"}, "trained_iterations .* gradient is local: leave it out"),
        ({"name": "one_pass", "depth": "fixed"}, "depth belongs to name=bptt, and name is one_pass: leave it out"),
        ({"name": "diffusion_blocks", "activation_checkpointing": True}, "activation_checkpointing .* name is diffusion_blocks"),
        ({"posterior_readout": False}, "optional_state leaves .* to posterior_readout, which is off: set optional_state=false as well"),
        ({"name": "bptt", "activation_checkpointing": True, "layer_checkpointing": "selective"}, "keeps the products .* choose one"),
        ({"layer_checkpointing_interval": 0}, "layer_checkpointing_interval must be at least 1, and it is 0"),
        ({"layer_checkpointing_interval": 2}, "belongs to layer_checkpointing=selective or full, .* is none: leave it out"),
    ],
)
def test_settings_without_an_effect_and_impossible_counts_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ObjectiveSettings(**settings)


def test_more_trained_iterations_than_a_fixed_depth_has_are_refused():
    assert objective_of(8).trained_limit == objective_of(1, "poisson").trained_limit == 8
    with pytest.raises(UserError, match="objective.trained_iterations=8 is more than the fixed depth model.iterations=7: lower it"):
        objective_of(7)
