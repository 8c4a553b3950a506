"""Proves the model right: Huginn's parameter counts and initialisation, the whole forward pass against a float64 reference, the
noise level's input that starts as the identity, the cache, the initial state, the tied head, and the refusal of bad settings."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rdtrain.model.cache import KeyValueCache
from rdtrain.model.recurrent import CONDITIONING_WIDTH, ModelConfig, ModelSettings, RecurrentDepthLM, initial_state

BASE = 50_000.0


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_ids(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def float64(x):
    return x.detach().double().numpy()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_huginns_less_its_query_and_key_biases():
    config = ModelConfig(width=5280, heads=55, mlp_width=17920, vocab_size=65536)
    with torch.device("meta"):
        model = RecurrentDepthLM(config)
    biases = 2 * 5280  # of one layer; the released 3.5B model learns them, we have none
    assert config.head_width == 96
    assert count(model) == 3_564_976_800 - 8 * biases
    assert count(model.cores[0].layers) == 1_581_592_320 - 4 * biases
    assert count(model.prelude_layers) == count(model.coda_layers) == 790_796_160 - 2 * biases
    assert count(model.cores[0].adapter) == 55_756_800
    assert count(model.embedding) == 346_030_080
    assert count(model.final_norm) == 5_280


@pytest.fixture(scope="module")
def wide_model():
    """d = 512 and 132 unrolled layers, as in Huginn's small runs."""
    torch.manual_seed(0)
    return RecurrentDepthLM(ModelConfig(mlp_width=512, vocab_size=300, noise_conditioning=True))


def test_initial_weights_are_truncated_normals_of_huginns_two_deviations(wide_model):
    nominal, seen = math.sqrt(2 / (5 * 512)), {"output": 0, "other": 0}
    truncated = scipy.stats.truncnorm(-3, 3)
    for name, parameter in wide_model.named_parameters():
        if "norm" in name or "modulation" in name or "noise_embedding" in name:
            continue
        kind = "output" if name.endswith("output.weight") else "other"
        scale = nominal / math.sqrt(2 * 132) if kind == "output" else nominal
        seen[kind] += 1
        assert parameter.std().item() == pytest.approx(scale * truncated.std(), rel=0.01), name
        assert parameter.std().item() == pytest.approx(0.0017 if kind == "output" else 0.0276, rel=0.02), name
        assert 2.9 * scale < parameter.abs().max().item() <= 3 * scale * (1 + 1e-6), name
        sample = parameter.detach().flatten()[:20_000].double().numpy() / scale
        assert scipy.stats.kstest(sample, truncated.cdf).pvalue > 1e-4, name
    assert seen == {"output": 16, "other": 2 + 16}


def test_initial_norms_are_one_and_the_noise_levels_maps_zero(wide_model):
    norms = [parameter for name, parameter in wide_model.named_parameters() if "norm" in name.split(".")[-2]]
    modulations = [parameter for name, parameter in wide_model.named_parameters() if "modulation" in name]
    assert len(norms) == 8 * 4 + 1 and len(modulations) == 6 * 2
    assert all((parameter == 1).all() for parameter in norms)
    assert all((parameter == 0).all() for parameter in modulations)
    for linear in (wide_model.noise_embedding.linear1, wide_model.noise_embedding.linear2):
        assert (linear.bias == 0).all()
        assert linear.weight.std().item() == pytest.approx(CONDITIONING_WIDTH**-0.5, rel=0.03)


def test_only_core_and_coda_layers_take_the_noise_level(build_model):
    conditioned, plain = build_model(noise_conditioning=True), build_model()
    owners = {name.split(".")[0] for name, _ in conditioned.named_parameters() if "modulation" in name}
    assert owners == {"cores", "coda_layers"}
    extra = {name for name, _ in conditioned.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert all("modulation" in name or name.startswith("noise_embedding.") for name in extra)


@pytest.mark.parametrize("levels", [None, 1, 6], ids=["unconditioned", "one level a sequence", "one level a position"])
def test_prelude_iterate_and_readout_equal_the_float64_reference(levels, build_model, reference):
    model, ids, state = build_model(noise_conditioning=levels is not None), token_ids(2, 6), normal(2, 6, 32)
    conditioning = None if levels is None else model.condition(normal(2, levels, seed=1))
    e = model.prelude(ids)
    next_state = model.iterate(state, e, conditioning)
    logits = model.readout(next_state, conditioning)
    embedding, final = float64(model.embedding.weight), float64(model.final_norm.weight)
    for row in range(2):
        condition = None if levels is None else float64(conditioning[row])
        x = embedding[ids[row].numpy()] * math.sqrt(32)
        for layer in model.prelude_layers:
            x = reference.block(layer, x, BASE)
        np.testing.assert_allclose(float64(e[row]), x, rtol=1e-3, atol=1e-4)
        x = np.concatenate((float64(state[row]), x), axis=1) @ reference.weights(model.cores[0].adapter).T
        for layer in model.cores[0].layers:
            x = reference.block(layer, x, BASE, condition)
        np.testing.assert_allclose(float64(next_state[row]), x, rtol=1e-3, atol=1e-4)
        x = reference.rms_norm(x, final, 1e-6)
        for layer in model.coda_layers:
            x = reference.block(layer, x, BASE, condition)
        x = reference.rms_norm(x, final, 1e-6) @ embedding.T
        np.testing.assert_allclose(float64(logits[row]), x, rtol=1e-3, atol=1e-4)


def test_the_rotary_base_and_the_norms_epsilon_are_the_settings(build_model):
    ids = token_ids(2, 6)
    changes = ({}, {"rope_base": 10.0}, {"norm_eps": 0.1})
    plain, other_base, other_epsilon = (build_model(**change).prelude(ids) for change in changes)
    assert not torch.allclose(plain, other_base, atol=1e-3)
    assert not torch.allclose(plain, other_epsilon, atol=1e-3)
    torch.testing.assert_close(plain[:, 0], other_base[:, 0])  # position 0 alone is not turned


def test_noise_embedding_equals_the_float64_formula(build_model, reference):
    embedding = build_model(noise_conditioning=True).noise_embedding
    c_noise = torch.tensor([[-1.55, -0.3], [0.2, 1.09]])
    frequencies = 2.0 ** np.linspace(-2, 4, CONDITIONING_WIDTH // 2)
    angle = 2 * math.pi * float64(c_noise)[..., None] * frequencies
    x = np.concatenate((np.cos(angle), np.sin(angle)), axis=-1)
    for linear in (embedding.linear1, embedding.linear2):
        x = reference.silu(x @ reference.weights(linear).T + float64(linear.bias))
    np.testing.assert_allclose(float64(embedding(c_noise)), x, rtol=1e-3, atol=1e-4)


SIGMAS = (0.002, 0.1, 3.0, 80.0)


def forward(model, sigma):
    """e, the state after two iterations, and logits, at one noise level; None for a model without."""
    ids, conditioning = token_ids(2, 6), None if sigma is None else model.condition(torch.full((2, 1), math.log(sigma) / 4))
    e = model.prelude(ids)
    state = model.iterate(model.iterate(normal(2, 6, 32), e, conditioning), e, conditioning)
    return e, state, model.readout(state, conditioning)


def test_a_new_models_noise_level_changes_nothing(build_model):
    conditioned, plain = build_model(noise_conditioning=True, perturbed=False), build_model(seed=1, perturbed=False)
    missing = plain.load_state_dict(conditioned.state_dict(), strict=False).missing_keys
    assert not missing
    expected = forward(plain, None)
    for sigma in SIGMAS:
        for actual, value in zip(forward(conditioned, sigma), expected):
            torch.testing.assert_close(actual, value, rtol=0, atol=1e-6)


def test_a_trained_models_noise_level_changes_core_and_coda_and_tells_levels_apart(build_model):
    model = build_model(noise_conditioning=True)
    outcomes = [forward(model, sigma) for sigma in SIGMAS]
    for first, second in zip(outcomes, outcomes[1:]):
        assert torch.equal(first[0], second[0]), "the prelude knows no noise level"
        assert (first[1] - second[1]).abs().max() > 0.1
        assert (first[2] - second[2]).abs().max() > 0.1
    e, state, _ = outcomes[0]
    low, high = (model.readout(state, model.condition(torch.full((2, 1), c_noise))) for c_noise in (-1.5, 1.0))
    assert (low - high).abs().max() > 0.1


@pytest.mark.parametrize("chunks", [[1] * 6, [4, 1, 1], [2, 3, 1]])
def test_a_model_fed_in_chunks_through_its_cache_equals_the_whole_sequence_at_once(chunks, build_model):
    model, iterations = build_model(noise_conditioning=True), 3
    ids, states = token_ids(2, 6), normal(iterations, 2, 6, 32)
    conditions = [model.condition(torch.full((2, 1), c_noise)) for c_noise in (1.0, 0.0, -1.0)]

    def run(start, stop, cache):
        """Each iteration has a state and a noise level of its own, so that a mixed-up slot would show."""
        if cache:
            cache.place.begin(model.rotary, stop - start)
        e = model.prelude(ids[:, start:stop], cache and cache.prelude)
        logits = []
        for k in range(iterations):
            state = model.iterate(states[k, :, start:stop], e, conditions[k], cache and cache.core[k])
            logits.append(model.readout(state, conditions[k], cache and cache.coda[k]))
        if cache:
            cache.advance()
        return torch.stack(logits)

    with torch.no_grad():
        cache = KeyValueCache(model.config, iterations, iterations, batch=2, capacity=6, like=states)
        bounds = np.cumsum([0, *chunks]).tolist()
        parts = [run(start, stop, cache) for start, stop in zip(bounds, bounds[1:])]
        torch.testing.assert_close(torch.cat(parts, dim=2), run(0, 6, None), rtol=1e-4, atol=1e-4)


def test_a_cache_has_slots_of_their_own_for_each_iteration_and_layer():
    config = ModelConfig(width=32, heads=4, prelude_layers=1, core_layers=3, coda_layers=2, vocab_size=50)
    like = torch.zeros(1, dtype=torch.bfloat16)
    cache = KeyValueCache(config, iterations=5, coda_iterations=1, batch=2, capacity=7, like=like)
    slots = [*cache.prelude, *(slot for part in (cache.core, cache.coda) for iteration in part for slot in iteration)]
    assert [len(cache.prelude), len(cache.core), len(cache.coda)] == [1, 5, 1]
    assert {len(iteration) for iteration in cache.core} == {3} and {len(iteration) for iteration in cache.coda} == {2}
    tensors = [tensor for slot in slots for tensor in (slot.keys, slot.values)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 2 * (1 + 5 * 3 + 2)
    assert all(tensor.shape == (2, 4, 7, 8) and tensor.dtype == torch.bfloat16 for tensor in tensors)


def test_initial_state_is_a_normal_of_deviation_root_two_fifths_truncated_at_three():
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(3)).clamp(min=2**-25)
    state, deviation = initial_state(uniform), math.sqrt(2 / 5)
    expected = scipy.stats.truncnorm(-3, 3, scale=deviation)
    assert scipy.stats.kstest(state.double().numpy(), expected.cdf).pvalue > 0.01
    assert state.abs().max() <= 3 * deviation * (1 + 1e-5)
    assert state.std().item() == pytest.approx(0.623, abs=0.005)
    inside = (uniform > 0.001) & (uniform < 0.999)
    np.testing.assert_allclose(state[inside].numpy(), expected.ppf(float64(uniform[inside])), rtol=1e-3, atol=1e-4)


def test_initial_state_is_finite_at_the_ends_and_keeps_its_shape():
    state = initial_state(torch.tensor([[2.0**-25, 0.5, 1 - 2.0**-24]]))
    assert state.shape == (1, 3) and state.isfinite().all()
    np.testing.assert_allclose(state[0].numpy(), [-3 * math.sqrt(2 / 5), 0, 3 * math.sqrt(2 / 5)], atol=1e-3)


def test_the_head_is_the_embedding_and_trains_it(build_model):
    model = build_model()
    matrices = [name for name, parameter in model.named_parameters() if parameter.shape == (50, 32)]
    assert matrices == ["embedding.weight"]
    model.readout(normal(2, 6, 32)).logsumexp(-1).sum().backward()
    assert (model.embedding.weight.grad.abs().sum(1) > 0).all(), "through the head alone, and into every row"


def test_unit_embedding_is_the_tokens_embedding_at_length_one(build_model):
    model, ids = build_model(), token_ids(2, 6)
    rows = float64(model.embedding.weight)[ids.numpy()]
    np.testing.assert_allclose(float64(model.unit_embedding(ids)), rows / np.sqrt((rows**2).sum(-1, keepdims=True)), rtol=1e-5)


def test_expected_embedding_equals_a_loop_over_the_vocabulary(build_model):
    model, logits = build_model(), 3 * normal(2, 4, 50)
    rows, out = float64(model.embedding.weight), float64(model.expected_embedding(logits))
    for batch in range(2):
        for position in range(4):
            scores = np.exp(float64(logits[batch, position]))
            expected = sum(scores[v] / scores.sum() * rows[v] / math.sqrt(rows[v] @ rows[v]) for v in range(50))
            np.testing.assert_allclose(out[batch, position], expected, rtol=1e-4, atol=1e-6)


def test_targets_and_expectations_are_fp32_in_a_bf16_model(build_model):
    model = build_model().bfloat16()
    assert model.unit_embedding(token_ids(2)).dtype == torch.float32
    assert model.expected_embedding(normal(2, 50).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["width", "heads", "mlp_width", "prelude_layers", "core_layers", "coda_layers", "iterations"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, and it is {value}$"):
        ModelSettings(**{name: value})


@pytest.mark.parametrize("name, value", [("rope_base", 0.0), ("rope_base", -1.0), ("rope_base", math.nan), ("norm_eps", -1e-6)])
def test_real_numbers_that_make_no_model_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        ModelSettings(**{name: value})


@pytest.mark.parametrize("width, heads", [(100, 8), (24, 8), (30, 4)])
def test_widths_that_do_not_split_into_heads_with_rotary_pairs_are_refused(width, heads):
    with pytest.raises(ValueError, match=f"width must be a multiple of 2 \\* heads .*{width}.*{2 * heads}"):
        ModelSettings(width=width, heads=heads)


def test_a_model_without_a_vocabulary_is_refused_and_a_config_checks_its_settings_too():
    with pytest.raises(ValueError, match="vocab_size must be at least 1, and it is 0"):
        ModelConfig()
    with pytest.raises(ValueError, match="core_layers"):
        ModelConfig(core_layers=0, vocab_size=50)
