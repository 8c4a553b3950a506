"""Proves the layer right against float64 loops: norm, rotary positions, causal attention with and without a cache, MLP, the whole
block with its noise-level input. Also which attention kernel is chosen, with flash-attn absent, impostor or present."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rdtrain.model import attention as attention_module
from rdtrain.model.attention import (
    additive_mask,
    attend_from_one,
    attention_backend,
    causal_attention,
    document_mask,
    refuse_head_width,
    uses_flash_attn,
)
from rdtrain.model.cache import CacheSlot
from rdtrain.model.layers import Attention, GatedMLP, RMSNorm, RotaryTable, SandwichBlock, rotate

CPU = torch.device("cpu")
BASE = 50_000.0


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float64(x):
    return x.detach().double().numpy()


def empty_slot(batch=2, heads=4, capacity=10, head_width=8):
    return CacheSlot(*torch.zeros(2, batch, heads, capacity, head_width))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_equals_the_float64_formula(eps, perturb, reference):
    norm, x = perturb(RMSNorm(32, eps)), 3 * normal(2, 5, 32)
    expected = reference.rms_norm(float64(x), float64(norm.weight), eps)
    np.testing.assert_allclose(float64(norm(x)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_fp32_and_returns_the_inputs_dtype(reference):
    norm, x = RMSNorm(32, 1e-6), (200 * normal(4, 32)).half()  # the squares overflow fp16
    out = norm(x)
    assert out.dtype == torch.float16
    np.testing.assert_allclose(float64(out), reference.rms_norm(float64(x), 1.0, 1e-6), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("start", [0, 5])
def test_rotary_embedding_equals_a_loop_over_complex_numbers(start, reference):
    x = normal(2, 3, 6, 8)
    turned = rotate(x, RotaryTable(8, BASE)(start, start + 6, CPU))
    for batch in range(2):
        for head in range(3):
            expected = reference.rotary(float64(x[batch, head]), start, BASE)
            np.testing.assert_allclose(float64(turned[batch, head]), expected, rtol=1e-5, atol=1e-5)


def test_rotary_products_depend_on_the_distance_of_two_positions_alone():
    query, key = normal(1, 1, 1, 8, seed=1), normal(1, 1, 1, 8, seed=2)

    def product(query_position, key_position):
        turned = [rotate(x, RotaryTable(8, BASE)(p, p + 1, CPU)) for x, p in ((query, query_position), (key, key_position))]
        return (turned[0] * turned[1]).sum().item()

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) == pytest.approx(product(4, 0), abs=1e-4)
    assert abs(product(7, 3) - product(3, 7)) > 0.01, "and the direction counts"
    assert abs(product(7, 3) - product(8, 3)) > 0.01


def test_rotary_table_stays_fp32_precise_at_late_positions():
    cos, sin = RotaryTable(96, BASE)(4000, 4001, CPU)
    angle = 4000 * BASE ** -(np.arange(0, 96, 2) / 96)
    assert cos.dtype == sin.dtype == torch.float32
    np.testing.assert_allclose(cos[0].numpy(), np.cos(angle), atol=2e-3)
    np.testing.assert_allclose(sin[0].numpy(), np.sin(angle), atol=2e-3)


SHAPES = pytest.mark.parametrize("queries, keys", [(7, 7), (1, 7), (3, 7), (1, 1)], ids=["whole", "one", "chunk", "first"])


def assert_is_causal_attention(out, query, key, value, reference):
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            expected = reference.causal_attention(*(float64(x[batch, head]) for x in (query, key, value)))
            np.testing.assert_allclose(float64(out[batch, head]), expected, rtol=1e-5, atol=1e-5)


@SHAPES
def test_causal_attention_equals_a_softmax_loop(queries, keys, reference):
    query, key, value = 2 * normal(2, 3, queries, 8, seed=1), normal(2, 3, keys, 8, seed=2), normal(2, 3, keys, 8, seed=3)
    assert_is_causal_attention(causal_attention(query, key, value), query, key, value, reference)


@SHAPES
def test_flash_attn_is_called_in_its_own_layout_and_its_answer_comes_back_in_ours(queries, keys, reference, monkeypatch):
    def kernel(query, key, value, *, causal):
        """As flash-attn documents it: [B, T, H, D], the causal mask aligned with the last key."""
        assert causal and query.shape == (2, queries, 3, 8) and key.shape == value.shape == (2, keys, 3, 8)
        out = torch.zeros_like(query)
        for batch in range(2):
            for head in range(3):
                heads = reference.causal_attention(*(float64(x[batch, :, head]) for x in (query, key, value)))
                out[batch, :, head] = torch.tensor(heads)
        return out

    monkeypatch.setattr(attention_module, "uses_flash_attn", lambda *_: True)
    monkeypatch.setattr(attention_module, "FLASH_ATTN", kernel)
    query, key, value = 2 * normal(2, 3, queries, 8, seed=1), normal(2, 3, keys, 8, seed=2), normal(2, 3, keys, 8, seed=3)
    assert_is_causal_attention(causal_attention(query, key, value), query, key, value, reference)


@pytest.fixture
def flash_attn(monkeypatch):
    """A function that installs `module` as flash_attn (None: the import fails) and looks for it anew."""

    def install(module):
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(attention_module, "FLASH_ATTN", attention_module.find_flash_attn())

    return install


def fake_flash_attn(**contents):
    module = types.ModuleType("flash_attn")
    vars(module).update(contents)
    return module


CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_used_on_cpu_even_where_flash_attn_is_present_and_its_kernel_is_named(dtype, flash_attn):
    flash_attn(fake_flash_attn(flash_attn_func=print))
    assert attention_backend(CPU, dtype) == attention_backend(CPU, dtype, masked=True) == "SDPA flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_backend(CPU, dtype) == "SDPA math"


def test_flash_attn_is_used_on_cuda_in_half_precision_where_it_is_present_and_takes_the_heads(flash_attn):
    flash_attn(None)
    assert not uses_flash_attn(CUDA, torch.bfloat16, 64)
    flash_attn(fake_flash_attn(cute=object()))  # flash-attn-4 answers to the name too
    assert not uses_flash_attn(CUDA, torch.bfloat16, 64)
    flash_attn(fake_flash_attn(flash_attn_func=print))
    assert attention_backend(CUDA, torch.bfloat16) == attention_backend(torch.device("cuda", 3), torch.float16) == "flash-attn"
    assert uses_flash_attn(CUDA, torch.bfloat16, 256) and not uses_flash_attn(CUDA, torch.bfloat16, 258)
    assert not uses_flash_attn(CUDA, torch.float32, 64)


def test_heads_that_only_the_math_kernel_takes_are_refused_where_it_would_run():
    bf16, fp32 = torch.bfloat16, torch.float32
    for device, dtype, width in ((CUDA, bf16, 20), (CUDA, bf16, 264), (CUDA, fp32, 258), (CPU, bf16, 258)):
        refuse_head_width(device, dtype, width)
    refuse_head_width(CUDA, fp32, 20, masked=True)
    refuse_head_width(CUDA, bf16, 264, masked=True)
    with pytest.raises(ValueError, match="^heads of 20 channels are no multiple of 8, as attention that keeps documents apart needs them"):
        refuse_head_width(CUDA, bf16, 20, masked=True)
    with pytest.raises(ValueError, match="^heads of 258 channels are more than the 256 of flash attention and no multiple of 8: choose"):
        refuse_head_width(CUDA, torch.bfloat16, 258)


def test_training_in_half_precision_never_takes_the_math_kernel_compiled_or_not(monkeypatch):
    """With the CPU's kernels, the first of ours being its own flash kernel too; where only others are left, it fails."""
    monkeypatch.setattr(attention_module, "half_precision", lambda device, dtype: True)
    query = normal(1, 2, 6, 8, seed=1).requires_grad_()
    compiled = torch.compile(causal_attention, fullgraph=True, dynamic=False, backend="eager")
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    for attention in (causal_attention, compiled):
        torch.testing.assert_close(attention(query, query, query), expected)
    before = torch.backends.cuda.math_sdp_enabled()
    monkeypatch.setattr(attention_module, "KERNELS", [SDPBackend.EFFICIENT_ATTENTION])
    with pytest.raises(RuntimeError, match="No (available|viable)"):
        causal_attention(query, query, query)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(query, query, query), expected.detach())
    assert torch.backends.cuda.math_sdp_enabled() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_from_one_position_as_compiled_code_takes_it_is_the_same(dtype):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    seen = torch.rand(2, 1, 1, 9) < 0.6
    seen[..., 4] = True
    low, tolerance = [each.to(dtype) for each in (query, key, value)], 1e-5 if dtype == torch.float32 else 2e-2
    for mask in (None, seen, additive_mask(seen, dtype)):
        expected = causal_attention(query, key, value, seen) if mask is not None else causal_attention(query, key, value)
        found = attend_from_one(*low, mask)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_attention_equals_a_loop_over_heads_and_positions(perturb, reference):
    torch.manual_seed(0)
    attention, x = perturb(Attention(32, 4)), normal(2, 6, 32)
    out = attention(x, RotaryTable(8, BASE)(0, 6, CPU))
    for row in range(2):
        np.testing.assert_allclose(float64(out[row]), reference.attention(attention, float64(x[row]), BASE), rtol=1e-4, atol=1e-5)


def test_gated_mlp_equals_the_float64_formula(perturb, reference):
    torch.manual_seed(0)
    mlp, x = perturb(GatedMLP(32, 48)), normal(6, 32)
    np.testing.assert_allclose(float64(mlp(x)), reference.mlp(mlp, float64(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [None, 1, 6], ids=["unconditioned", "one level a sequence", "one level a position"])
def test_sandwich_block_equals_the_float64_formula(length, perturb, reference):
    torch.manual_seed(0)
    block, x = perturb(SandwichBlock(32, 4, 48, 1e-6, None if length is None else 20)), normal(2, 6, 32)
    conditioning = None if length is None else normal(2, length, 20, seed=1)
    out = block(x, RotaryTable(8, BASE)(0, 6, CPU), conditioning)
    for row in range(2):
        condition = None if length is None else float64(conditioning[row])
        expected = reference.block(block, float64(x[row]), BASE, condition)
        np.testing.assert_allclose(float64(out[row]), expected, rtol=1e-4, atol=1e-4)


def test_layers_have_no_biases_apart_from_the_noise_levels():
    block = SandwichBlock(32, 4, 48, 1e-6, 20)
    assert [name for name, _ in block.named_parameters() if "bias" in name] == ["modulation.bias"]


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 1, 4], [5, 3]])
def test_a_block_fed_in_chunks_through_a_cache_equals_the_whole_sequence_at_once(chunks, perturb):
    torch.manual_seed(0)
    block, x, slot = perturb(SandwichBlock(32, 4, 48, 1e-6)), normal(2, 8, 32), empty_slot()
    whole = block(x, RotaryTable(8, BASE)(0, 8, CPU))
    parts, start = [], 0
    for length in chunks:
        rotary = RotaryTable(8, BASE)(start, start + length, CPU)
        with torch.no_grad():
            parts.append(block(x[:, start : start + length], rotary, slot=slot))
        start += length
    assert slot.length == 8
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.detach(), rtol=1e-4, atol=1e-5)


def test_a_cache_slot_returns_what_was_put_in_and_nothing_of_its_empty_part():
    slot, keys, values = empty_slot(), normal(2, 4, 7, 8, seed=1), normal(2, 4, 7, 8, seed=2)
    slot.append(keys[:, :, :4], values[:, :, :4])
    all_keys, all_values = slot.append(keys[:, :, 4:], values[:, :, 4:])
    assert torch.equal(all_keys, keys) and torch.equal(all_values, values)


def test_a_full_cache_slot_refuses_more_and_says_how_much_it_holds():
    slot, full = empty_slot(), normal(2, 4, 10, 8)
    slot.append(full, full)
    one = full[:, :, :1]
    with pytest.raises(ValueError, match="holds 10 positions, and 11 were asked"):
        slot.append(one, one)
    assert slot.length == 10 and torch.equal(slot.keys, full), "and is left as it was"


def test_documents_are_kept_apart_by_the_kernels_that_take_a_mask_and_never_by_the_math_kernel(monkeypatch):
    """On the CPU, whose flash kernel takes one; the kernel for CUDA, which is not here, fails in training."""
    query = normal(1, 2, 6, 8, seed=1).requires_grad_()
    mask = document_mask(torch.tensor([[4, 1, 4, 4, 1, 4]]), 1, query.dtype)
    expected = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    cut = [causal_attention(*3 * [query[:, :, start:stop]]) for start, stop in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(expected, torch.cat(cut, dim=2))
    monkeypatch.setattr(attention_module, "uses_flash_attn", lambda *_: True)
    assert torch.equal(causal_attention(query, query, query, mask), expected)
    monkeypatch.setattr(attention_module, "half_precision", lambda device, dtype: True)
    with pytest.raises(RuntimeError, match="No (available|viable)"):
        causal_attention(query, query, query, mask)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(query, query, query, mask), expected.detach())
    monkeypatch.setattr(attention_module, "MASKED_KERNELS", [SDPBackend.FLASH_ATTENTION])
    torch.testing.assert_close(causal_attention(query, query, query, mask), expected)
