"""Compiling what a step of generation does over one position, where the time goes into starting kernels.

One position makes some thousands of products, sums and norms of a few numbers, and each kernel takes about 2 us on an H200 whatever it
computes. Compiled, what lies between the products becomes one kernel. Of one text alone products too are sums that a compiler joins
with what is around them, as long as they are small: reading a large weight takes longer than starting a kernel, and cuBLAS reads it nearly
twice as fast as a generated sum does (docs/lab.md).
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

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


def _with_sums(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    from torch._inductor.compile_fx import compile_fx  # costs a second that only those wait for who compile
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    others = table[torch.ops.aten.mm.default]  # torch's own, which does the same for any weight where it also tunes each kernel

    def product(one: Tensor, other: Tensor, **how) -> Tensor:
        return (one.unsqueeze(2) * other.unsqueeze(0)).sum(dim=1) if is_sum(one.shape[0], other) else others(one, other, **how)

    return compile_fx(graph, inputs, decompositions=table | {torch.ops.aten.mm.default: product})
