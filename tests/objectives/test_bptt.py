"""Proves backpropagation through time right: loss and every gradient against autograd on a loop that is unrolled by hand, layer
by layer, with explicit detaching; that free iterations carry no gradient; that held-out likelihood runs all K iterations."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import BackpropagationThroughTime, ObjectiveSettings, build_objective

INDICES = [11, 3, 8, 40, 5, 21]
SPLITS = pytest.mark.parametrize("free, trained", [(3, 2), (0, 4), (3, 1)], ids=["truncated", "full", "local"])


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


@SPLITS
def test_loss_and_every_gradient_equal_those_of_the_loop_unrolled_by_hand(
    free, trained, build_model, tokens, random_of, gradients, assert_same_gradients
):
    model = build_model(False)
    loss = BackpropagationThroughTime(free, trained, 4)(model, tokens, random_of(INDICES))
    expected = loss_by_hand(model, tokens, random_of(INDICES), free, trained)
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(loss.metrics) == ["loss"]
    total, count = loss.metrics["loss"]
    assert not total.requires_grad and total.item() / count.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model, loss.value), gradients(model, expected))


def relative_difference(first, second):
    return ((first - second).norm() / second.norm()).item()


def test_free_iterations_change_the_loss_but_carry_no_gradient(build_model, tokens, random_of, gradients):
    model = build_model(False)
    full, truncated, local, shallow = (
        BackpropagationThroughTime(free, trained, 4)(model, tokens, random_of(INDICES)).value
        for free, trained in ((0, 4), (2, 2), (3, 1), (0, 1))
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


def test_the_prelude_is_trained_even_when_only_the_last_iteration_is(build_model, tokens, random_of, gradients):
    model = build_model(False)
    found = gradients(model, BackpropagationThroughTime(3, 1, 4)(model, tokens, random_of(INDICES)).value)
    assert all((gradient != 0).any() for gradient in found.values())


def test_the_number_of_core_calls_with_and_without_gradient_is_as_set(build_model, tokens, random_of, monkeypatch):
    model, calls = build_model(False), []
    iterate = model.iterate
    monkeypatch.setattr(model, "iterate", lambda *args: (calls.append(torch.is_grad_enabled()), iterate(*args))[1])
    BackpropagationThroughTime(3, 2, 4)(model, tokens, random_of(INDICES))
    assert calls == [False] * 3 + [True] * 2


def test_gradients_survive_autocast_although_free_iterations_fill_its_weight_cache(build_model, tokens, random_of, gradients):
    """Weights cast to bf16 without gradient and then reused from autocast's cache would be trained no more."""
    model, objective = build_model(False), BackpropagationThroughTime(3, 1, 4)
    expected = gradients(model, objective(model, tokens, random_of(INDICES)).value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(model, tokens, random_of(INDICES)).value
    for name, gradient in gradients(model, loss).items():
        assert relative_difference(gradient, expected[name]) < 0.1, name


def test_the_initial_state_is_a_function_of_the_samples_index(build_model, tokens, random_of):
    objective, model = BackpropagationThroughTime(1, 1, 2), build_model(False)
    losses = [objective(model, row.unsqueeze(0), random_of([index])).value.item() for row, index in zip(tokens, INDICES)]
    order = [4, 0, 5, 2, 1, 3]
    shuffled = objective(model, tokens[order], random_of([INDICES[i] for i in order])).value.item()
    assert shuffled == pytest.approx(np.mean(losses), rel=1e-5)
    others = [objective(model, row.unsqueeze(0), random_of([index + 1])).value.item() for row, index in zip(tokens, INDICES)]
    assert all(abs(first - second) > 1e-5 for first, second in zip(losses, others))


@pytest.mark.parametrize("iterations", [1, 5])
def test_held_out_nll_runs_all_iterations_of_inference_whatever_was_trained(iterations, build_model, tokens, random_of):
    model = build_model(False)
    nll = BackpropagationThroughTime(2, 1, iterations).held_out_nll(model, tokens, random_of(INDICES))
    logits = logits_by_hand(model, tokens[:, :-1], random_of(INDICES), 0, iterations).double()
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert nll.shape == (6, 8) and nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-4, atol=1e-5)


def test_one_and_five_iterations_of_inference_differ(build_model, tokens, random_of):
    model = build_model(False)
    one, five = (BackpropagationThroughTime(0, 1, k).held_out_nll(model, tokens, random_of(INDICES)) for k in (1, 5))
    assert (one - five).abs().max() > 1e-3


def test_the_objective_is_built_by_name_with_its_iterations():
    objective = build_objective(ObjectiveSettings("bptt", free_iterations=6, trained_iterations=2), NoiseSettings(), 9)
    assert isinstance(objective, BackpropagationThroughTime)
    assert objective.noise_conditioning is False
    assert (objective.free_iterations, objective.trained_iterations, objective.iterations) == (6, 2, 9)


@pytest.mark.parametrize("free, trained", [(-1, 8), (24, 0), (0, -2)])
def test_counts_that_unroll_nothing_are_refused(free, trained):
    with pytest.raises(ValueError, match=f"free_iterations .* trained_iterations .* they are {free} and {trained}"):
        ObjectiveSettings("bptt", free_iterations=free, trained_iterations=trained)
