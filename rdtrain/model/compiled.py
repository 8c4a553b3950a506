"""Compiling what a step of generation does over one position, where the time goes into starting kernels.

One position makes some thousands of products, sums and norms of a few numbers, and each kernel takes about 2 us on an H200 whatever it
computes. Compiled, what lies between the products becomes one kernel. Of one text alone products too are sums that a compiler joins
with what is around them, as long as they are small: reading a large weight takes longer than starting a kernel, and cuBLAS reads it nearly
twice as fast as a generated sum does (docs/lab.md). The compiler joins sums that are equally many, of equally many numbers. So what is one
sum, such as a norm's, is written as many times over as the product beside it has outputs (`spread`), and computed anew for each.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGEST_SUM = 2**22
"""Numbers of the largest weight whose product with one position is written as a sum."""


@functools.cache
def compiled_part(part: Callable) -> Callable:
    """A function, compiled for all chains and models, at its first calls.

    Of more kinds of models and batches in one process than torch keeps code for, it warns, and runs the others as they are.
    """
    return torch.compile(part, backend=_with_sums)


def is_sum(positions: int, weight: Tensor) -> bool:
    """Whether compiled code takes the product of so many positions with a weight as a sum."""
    return positions == 1 and weight.device.type == "cuda" and weight.numel() <= LARGEST_SUM


def spread(x: Tensor, product: nn.Linear | None) -> Tensor:
    """One position [1, 1, d], in compiled code: once for each output of the product that follows, [1, 1, n, d], where that is a sum.

    What is between here and the product, such as a norm, then belongs to the product's own kernel, in which each output computes it anew.
    Else the norm's sum would be a kernel of its own, since it is one sum, and the product is as many as it has outputs. Other x stay as
    they are.
    """
    if product is None or not torch.compiler.is_compiling() or x.dim() == 4 or not is_sum(x.numel() // x.shape[-1], product.weight):
        return x
    # Unlike `expand`, which the compiler may see through, this has it write x, and not all copies of what it is computed from.
    return x.contiguous().as_strided((1, 1, product.weight.shape[0], x.shape[-1]), (0, 0, 0, 1))


def once(x: Tensor) -> Tensor:
    """[B, T, d], of that or of what `spread` made of it."""
    return x if x.dim() < 4 else x[..., 0, :]


def multiply(x: Tensor, product: nn.Linear) -> Tensor:
    """The product [B, T, n] of x [B, T, d], or of what came of `spread` for this product."""
    return product(x) if x.dim() < 4 else (x * product.weight).sum(-1)


def _with_sums(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """What torch.compile makes of a graph, with small products as sums.

    Deterministic: by default the compiler times several forms of a sum as the program first runs, and keeps one. Of some that take 2 us it
    was seen to keep one that takes 17 (docs/lab.md); and chosen by rule, a text is the same in every process.
    """
    from torch._inductor.compile_fx import compile_fx  # costs a second that only those wait for who compile
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    others = table[torch.ops.aten.mm.default]  # torch's own, which does the same for any weight where it also tunes each kernel

    def product(one: Tensor, other: Tensor, **how) -> Tensor:
        return (one.unsqueeze(2) * other.unsqueeze(0)).sum(dim=1) if is_sum(one.shape[0], other) else others(one, other, **how)

    decompositions = table | {torch.ops.aten.mm.default: product}
    return compile_fx(graph, inputs, decompositions=decompositions, config_patches={"deterministic": True})
