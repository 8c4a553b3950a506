"""Proves the control an ordinary language model: its loss and gradients are those of layers called by hand, no random number bears on
them, and generation starts where training did."""

import math

import pytest
import torch
import torch.nn.functional as F

from rdtrain.errors import UserError
from rdtrain.model.generation import Sampling, generate
from rdtrain.model.layers import RotaryTable
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.objectives.one_pass import OnePass


@pytest.fixture
def model(build_model):
    return build_model(False, iterations=1, **OnePass.model_fields)


def logits_by_hand(model, inputs):
    """From zeros only the adapter's half for e is left."""
    rotary = RotaryTable(8, 50_000.0)(0, inputs.shape[1], inputs.device)
    x = F.embedding(inputs, model.embedding.weight) * math.sqrt(32)
    for layer in model.prelude_layers:
        x = layer(x, rotary)
    x = x @ model.cores[0].adapter.weight[:, 32:].T
    for layer in model.cores[0].layers:
        x = layer(x, rotary)
    x = model.final_norm(x)
    for layer in model.coda_layers:
        x = layer(x, rotary)
    return model.final_norm(x) @ model.embedding.weight.T


def test_loss_gradients_and_held_out_nll_are_those_of_prelude_core_and_coda_by_hand(model, tokens, random_of, gradients):
    loss = OnePass(1)(model, tokens, random_of(range(6)))
    expected = F.cross_entropy(logits_by_hand(model, tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    assert loss.value.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert list(loss.metrics) == ["loss"]
    actual = gradients(model, loss.value)
    for name, gradient in gradients(model, expected.mean()).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)
    adapter = actual["cores.0.adapter.weight"]
    assert adapter[:, :32].abs().max() == 0 and adapter[:, 32:].abs().max() > 0
    nll = OnePass(1).held_out_nll(model, tokens, random_of(range(6)))
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_no_random_number_bears_on_it(model, tokens, random_of):
    values = {OnePass(1)(model, tokens, random_of(range(first, first + 6), seed, step)).value.item()
              for first, seed, step in ((0, 5, 0), (100, 5, 0), (0, 6, 0), (0, 5, 9))}
    assert len(values) == 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_starts_from_zeros_as_its_training_did(model, tokens, use_cache):
    prompt = tokens[:, :5]
    chosen = torch.stack(list(generate(model, prompt, 3, 1, NoiseSettings(), Sampling(0.0), seed=1, use_cache=use_cache)), dim=1)
    for _ in range(3):
        prompt = torch.cat((prompt, logits_by_hand(model, prompt)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(chosen, prompt[:, 5:])


def test_it_is_built_by_name_for_one_iteration_alone():
    objective = build_objective(ObjectiveSettings("one_pass"), NoiseSettings(), 1)
    assert isinstance(objective, OnePass) and objective.model_fields == {"initial_state": "zero"}
    with pytest.raises(UserError, match="one_pass runs the core once, and model.iterations is 32: set model.iterations=1"):
        build_objective(ObjectiveSettings("one_pass"), NoiseSettings(), 32)


def test_another_initial_state_is_refused():
    with pytest.raises(ValueError, match="initial_state must be normal or zero, and it is ones"):
        ModelConfig(vocab_size=5, initial_state="ones")
