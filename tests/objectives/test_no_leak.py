"""Proves that no position sees what it has to predict: with pure noise a position knows its past alone, and in training it knows
its next token only through its own noised state. By changing tokens one at a time, exactly, and by the Jacobian of the logits."""

import math

import pytest
import torch

from rdtrain.model.denoiser import denoise
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks, ObjectiveSettings
from rdtrain.objectives.one_pass import OnePass

LENGTH = 8
SIGMA = 0.3
SIGMA_DATA = 1 / math.sqrt(32)


def other_token(tokens, position):
    """The same tokens with another one at this position of every sequence."""
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 7) % 50
    return changed


def changed_positions(first, second):
    """For each position, whether any of its numbers differ: the comparison is exact."""
    return (first != second).flatten(2).any(-1).any(0).tolist()


@pytest.fixture(params=["diffusion_blocks", "bptt", "one_pass"])
def next_token_logits(request, build_model, random_of, fixed_depth):
    """A function from inputs [6, 8] to logits, all randomness fixed."""
    if request.param == "diffusion_blocks":
        objective, model = DiffusionBlocks(NoiseSettings(), 4), build_model(True)
    elif request.param == "bptt":
        objective, model = fixed_depth(4, 2), build_model(False)
    else:
        objective, model = OnePass(1), build_model(False, iterations=1)
    return lambda inputs: objective.next_token_logits(model, inputs, random_of(range(6))).detach()


@pytest.mark.parametrize("position", range(LENGTH))
def test_changing_an_input_changes_no_earlier_logits_and_all_from_there_on(position, next_token_logits, tokens):
    inputs = tokens[:, :-1]
    changed = changed_positions(next_token_logits(inputs), next_token_logits(other_token(inputs, position)))
    assert changed == [False] * position + [True] * (LENGTH - position)


@pytest.mark.parametrize("position", range(LENGTH - 1))
def test_changing_the_token_that_a_position_predicts_does_not_change_its_prediction(position, next_token_logits, tokens):
    inputs = tokens[:, :-1]
    first, second = next_token_logits(inputs), next_token_logits(other_token(inputs, position + 1))
    assert torch.equal(first[:, : position + 1], second[:, : position + 1])


def test_the_last_target_and_its_embedding_are_no_part_of_the_held_out_logits(build_model, tokens, random_of):
    """Nothing but inputs can reach next_token_logits: it may not ask for a target's embedding at all."""
    objective, model = DiffusionBlocks(NoiseSettings(), 4), build_model(True)
    model.unit_embedding = None
    objective.held_out_nll(model, tokens, random_of(range(6)))


@pytest.fixture(
    params=[
        {},
        {"posterior_readout": False, "optional_state": False},
        {"optional_state": False},
        {"wiener_input": False},
        {"self_conditioning": True},
        {"chain_states": True},
        {"self_conditioning": True, "chain_states": True, "core_readout": True},
        {"self_conditioning": True, "chain_states": True, "level_per": "token"},
        {"self_conditioning": True, "chain_states": True, "blocks": 2},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def training_pass(request, build_model, random_of, monkeypatch):
    """A function from tokens to (logits of all readouts, y) of the objective's own training pass, all randomness fixed. y, the clean
    part of the noised state, can be given instead of being computed from the targets."""
    settings = dict(request.param)
    level_per, blocks = settings.pop("level_per", "sequence"), settings.pop("blocks", 1)
    noise = NoiseSettings(share_at_sigma_max=0.0, level_per=level_per)
    objective, seen = DiffusionBlocks(noise, 4, ObjectiveSettings(**settings), blocks), {}
    model = build_model(blocks=blocks, **objective.model_fields)
    unit_embedding = model.unit_embedding

    head_loss = model._head_loss

    def remember_logits(hidden, targets, evidence, weights=None):
        seen.setdefault("logits", []).append(model.head(hidden, evidence).detach())
        return head_loss(hidden, targets, evidence, weights)

    def run(tokens, held_y=None):
        def remember_y(ids):
            seen["y"] = unit_embedding(ids).detach() if held_y is None else held_y
            return seen["y"]

        with monkeypatch.context() as patch:
            patch.setattr(model, "_head_loss", remember_logits)
            patch.setattr(model, "unit_embedding", remember_y)
            objective(model, tokens, random_of(range(6)))
        logits = seen.pop("logits")
        assert len(logits) == 1 + objective.core_readout
        return torch.cat(logits, dim=-1), seen["y"]

    return run


@pytest.mark.parametrize("position", range(LENGTH))
def test_in_training_a_positions_target_reaches_it_and_no_earlier_position(position, training_pass, tokens):
    first, _ = training_pass(tokens)
    second, _ = training_pass(other_token(tokens, position + 1))
    assert changed_positions(first, second) == [False] * position + [True] * (LENGTH - position)


@pytest.mark.parametrize("position", range(LENGTH))
def test_in_training_a_positions_target_reaches_it_through_its_own_state_alone(position, training_pass, tokens):
    changed = other_token(tokens, position + 1)
    first, y = training_pass(tokens)
    _, changed_y = training_pass(changed)
    assert changed_positions(y, changed_y) == [i == position for i in range(LENGTH)]
    held = changed_y.clone()
    held[:, position] = y[:, position]
    second, _ = training_pass(changed, held)
    assert changed_positions(first, second) == [False] * (position + 1) + [True] * (LENGTH - position - 1)


@pytest.fixture
def z(build_model, tokens):
    """The noised state of a training pass at one level: [6, 8, 32]."""
    eps = torch.randn(6, LENGTH, 32, generator=torch.Generator().manual_seed(3))
    return build_model(True).unit_embedding(tokens[:, 1:]).detach() + SIGMA * eps


def jacobian_blocks(compute, x):
    """compute: x [1, T, d] -> logits [1, T, V]. Returns [T, T]: the largest |d logits_i / d x_j| of each pair of positions."""
    jacobian = torch.autograd.functional.jacobian(compute, x)
    return jacobian[0, :, :, 0].abs().amax(dim=(1, 3))


def assert_exactly_lower_triangular(blocks):
    for i in range(LENGTH):
        for j in range(LENGTH):
            assert (blocks[i, j] == 0) if j > i else (blocks[i, j] > 1e-6), f"position {i} by {j}: {blocks[i, j]}"


def compute_from_embeddings(model, tokens, function):
    """function(model, inputs) as a function of what the embedding layer returns for the inputs."""

    def compute(x):
        handle = model.embedding.register_forward_hook(lambda module, args, output: x)
        try:
            return function(model, tokens[:1, :-1])
        finally:
            handle.remove()

    return compute


def test_the_jacobian_of_training_logits_by_the_noised_state_is_lower_triangular(build_model, tokens, z):
    model = build_model(True)
    e, sigma = model.prelude(tokens[:1, :-1]).detach(), torch.full((1, 1), SIGMA)
    assert_exactly_lower_triangular(jacobian_blocks(lambda z: denoise(model, z, e, sigma, SIGMA_DATA), z[:1]))


def test_the_jacobian_of_training_logits_by_the_input_embeddings_is_lower_triangular(build_model, tokens, z):
    model, sigma = build_model(True), torch.full((1, 1), SIGMA)
    compute = compute_from_embeddings(model, tokens, lambda model, inputs: denoise(model, z[:1], model.prelude(inputs), sigma, SIGMA_DATA))
    assert_exactly_lower_triangular(jacobian_blocks(compute, model.embedding(tokens[:1, :-1]).detach()))


def test_the_jacobian_of_unrolled_logits_by_the_input_embeddings_is_lower_triangular(build_model, tokens, random_of, fixed_depth):
    model, objective = build_model(False), fixed_depth(3, 3)
    compute = compute_from_embeddings(
        model, tokens, lambda model, inputs: objective.next_token_logits(model, inputs, random_of([0]))
    )
    assert_exactly_lower_triangular(jacobian_blocks(compute, model.embedding(tokens[:1, :-1]).detach()))


def test_a_noise_level_for_each_position_gives_no_position_a_later_ones_level(build_model, tokens, z):
    model = build_model(True)
    e, log_sigma = model.prelude(tokens[:, :-1]), torch.full((6, LENGTH), math.log(SIGMA))
    first = denoise(model, z, e, log_sigma.exp(), SIGMA_DATA)
    log_sigma[:, 5] += 1
    assert changed_positions(first, denoise(model, z, e, log_sigma.exp(), SIGMA_DATA)) == [False] * 5 + [True] * 3
