"""Proves the halves of the gated MLP's channels right, against a float64 formula and autograd, and that compilers are given many parts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config

from rdtrain.model.checkpointing import checkpointed
from rdtrain.model.halves import ALIGNED, PARTS, Halves, halves, part_widths

WIDTHS = pytest.mark.parametrize("width", [1, 3, 40, 321, 1000])


def operands(width, dtype=torch.float32):
    """Gate and value joined, and a gradient from above."""
    generator = torch.Generator().manual_seed(0)
    joined, above = (torch.randn(2, 3, channels, generator=generator) for channels in (2 * width, width))
    return (3 * joined).to(dtype).requires_grad_(), above.to(dtype)


def product(joined):
    gate, value = halves(joined)
    return F.silu(gate) * value


def plain(joined):
    gate, value = joined.chunk(2, dim=-1)
    return F.silu(gate) * value


def by_parts(joined):
    """As compiled code is to compute it, but uncompiled."""
    gate, value = Halves.apply(joined)
    return F.silu(gate) * value


def with_gradient(function, joined, above):
    out = function(joined)
    return out.detach(), *torch.autograd.grad(out, joined, above)


@pytest.fixture
def traced():
    """A function that compiles another no further than its graphs, and the list of these: of the forward and of the backward pass."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep)), graphs
    torch._dynamo.reset()


@WIDTHS
@pytest.mark.parametrize("function", [product, by_parts])
def test_gated_product_and_gradient_equal_the_float64_formula(width, function):
    joined, above = operands(width)
    out, gradient = with_gradient(function, joined, above)
    gate, value = np.split(joined.detach().double().numpy(), 2, axis=-1)
    sigmoid, above = 1 / (1 + np.exp(-gate)), above.double().numpy()
    np.testing.assert_allclose(out.double().numpy(), gate * sigmoid * value, rtol=1e-5, atol=1e-6)
    expected = np.concatenate((above * value * sigmoid * (1 + gate * (1 - sigmoid)), above * gate * sigmoid), axis=-1)
    np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_finite_differences():
    joined = operands(7, torch.float64)[0]
    assert torch.autograd.gradcheck(by_parts, joined) and torch.autograd.gradgradcheck(by_parts, joined)


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_traced_checkpointed_or_neither_it_is_autograds_to_the_bit(width, dtype, how, traced):
    joined, above = operands(width, dtype)

    def layer(joined):
        return product(joined) if how == "none" else checkpointed(how, product, joined)

    expected = with_gradient(plain, joined, above)
    for function in (layer, by_parts, traced[0](layer)):
        for one, other in zip(with_gradient(function, joined, above), expected, strict=True):
            assert one.dtype == dtype and torch.equal(one, other)
    with torch.inference_mode():
        assert torch.equal(traced[0](product)(joined), expected[0])


@WIDTHS
def test_parts_begin_at_aligned_channels_where_there_are_enough_and_make_up_the_whole(width):
    widths = part_widths(width)
    assert sum(widths) == width and len(widths) == min(PARTS, width) and min(widths) > 0
    assert width < PARTS * ALIGNED or not any(part % ALIGNED for part in widths[:-1])
    assert part_widths(8704) == [1728, 1728, 1728, 1728, 1792]


def test_the_compiler_is_given_more_parts_than_it_joins_by_one_kernel(traced):
    """Code for CPUs joins nothing by one kernel, so that it does not tell: tests/test_gpu.py looks at that for GPUs."""
    joined, above = operands(1000)
    with_gradient(traced[0](product), joined, above)
    joins = [[node for node in graph.graph.nodes if node.target == torch.ops.aten.cat.default] for graph in traced[1]]
    assert [len(each) for each in joins] == [0, 1]
    assert len(joins[1][0].args[0]) == 2 * PARTS > config.max_pointwise_cat_inputs
