"""Proves that what compiled code makes of one position, in forms that a compiler for a GPU joins, is the same as what other code makes of
it. The forms are run as they stand here, as the rules that choose them want a GPU."""

import pytest
import torch

from rdtrain.model import cache as cache_module
from rdtrain.model import chain, compiled, recurrent, solvers
from rdtrain.model.cache import KeyValueCache
from rdtrain.model.compiled import compiled_part, once, spread
from rdtrain.model.decoding import Decoder
from rdtrain.model.layers import RotaryTable, rotate, rotate_pairs, run_layers
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.sampling import Sampling
from rdtrain.model.solvers import expected_target


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sums(monkeypatch):
    """Products of one position are sums on the CPU, too."""
    for module in (compiled, recurrent, solvers, chain):
        monkeypatch.setattr(module, "is_sum", lambda positions, weight: positions == 1)


@pytest.fixture
def compiling(sums, monkeypatch):
    """A function after whose call code takes itself to be compiled."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("cut", [False, True])
def test_the_expected_target_summed_in_parts_is_that_of_float64(compiling, cut):
    """Some tokens of a part, or all of them, may have no weight."""
    targets, logits = torch.nn.functional.normalize(draw(8192, 24).double(), dim=-1), 30 * draw(1, 1, 8192, seed=1).double()
    if cut:
        logits[..., 512:1024] = logits[..., 5000:] = -torch.inf
    compiling()
    found = expected_target(logits.float(), targets.float().t().contiguous().t())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logits.softmax(-1) @ targets, rtol=1e-5, atol=1e-6)


def test_rotation_in_pairs_is_the_same_to_the_bit():
    x, rotary = draw(2, 4, 6, 8), RotaryTable(8, 50_000.0)(3, 9, torch.device("cpu"))
    assert torch.equal(rotate_pairs(x, rotary), rotate(x, rotary))


def test_one_position_is_spread_for_sums_alone(compiling):
    x, product = draw(1, 1, 5), torch.nn.Linear(5, 7)
    assert spread(x, product) is x
    compiling()
    assert torch.equal(spread(x, product), x.unsqueeze(2).expand(1, 1, 7, 5)) and torch.equal(once(spread(x, product)), x)
    several = x.expand(1, 2, 5)
    assert spread(x, None) is x and spread(several, product) is several


def test_layers_with_norms_computed_anew_for_each_output_are_the_same(build_model, perturb, compiling):
    """The second layer takes the first one's output as it is spread."""
    model, x, found = perturb(build_model(False, core_layers=2)), draw(1, 4, 32), []
    with torch.no_grad():
        for step in (None, compiling):
            cache = KeyValueCache(model.config, 1, 1, 1, 9, model.embedding.weight)
            for start, stop in ((0, 3), (3, 4)):
                if start and step is not None:
                    step()
                cache.place.begin(model.rotary, stop - start)
                out = run_layers(model.rotary, model.cores[0].layers, x[:, start:stop], None, cache.core[0])
                cache.advance()
            found.append((out, *(tensor for slot in cache.core[0] for tensor in (slot.keys, slot.values))))
    assert found[0][0].shape == (1, 1, 32)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest", [0, 2**20])
def test_keys_and_values_of_a_column_are_where_a_slow_loop_puts_them(build_model, compiling, monkeypatch, largest):
    monkeypatch.setattr(cache_module, "LARGEST_REWRITTEN", largest)
    model = build_model(False)
    heads, width = model.config.heads, model.config.head_width
    cache = KeyValueCache(model.config, 1, 1, 1, 70, model.embedding.weight)
    slot, expected = cache.core[0][0], torch.zeros(2, 1, heads, 70, width)
    compiling()
    for position in range(66):
        keys, values = new = draw(2, 1, heads, 1, width, seed=position)
        for head in range(heads):
            expected[:, 0, head, position] = new[:, 0, head, 0]
        cache.place.begin(model.rotary, 1)
        shown = slot.append(keys, values)
        cache.advance()
        assert torch.equal(torch.stack(shown), expected[:, :, :, : 64 if position < 64 else 70])
        assert torch.equal(torch.stack((slot.keys, slot.values)), expected)


@pytest.mark.parametrize("denoising", [True, False])
def test_one_text_is_written_as_without_compilation(build_model, sums, monkeypatch, denoising):
    """As the compiler is given it, but run as it stands."""
    model, texts = build_model(denoising, posterior_readout=denoising), []
    monkeypatch.setattr(solvers, "PART", 10)  # of a vocabulary of 50
    monkeypatch.setattr(compiled, "_with_sums", lambda graph, inputs: graph.forward)
    torch._dynamo.reset()
    compiled_part.cache_clear()
    try:
        for compiles in (False, True):
            decoder = Decoder(model, NoiseSchedule(NoiseSettings()), 6, Sampling(), 1, 70, compiled=compiles)
            texts.append(torch.stack(list(decoder.generate(torch.tensor([[3, 14, 15, 9, 26]]), 1, 8))))
    finally:
        compiled_part.cache_clear()
    assert torch.equal(*texts)
