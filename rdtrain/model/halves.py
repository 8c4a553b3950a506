"""The two halves of a tensor's channels, whose gradients compiled code joins by reading every number once and writing it once.

The gated MLP makes gate and value in one product, so their gradients are joined for its backward pass. On a GPU the compiler (torch 2.11
and 2.13) joins two tensors by one kernel over the whole that computes at each number what its half needs: silu(gate) * value's gradients
are two of 2 m numbers a token, for which gate and the gradient from above are read twice. More than eight tensors it has written each to
its place instead. So ten are joined here, five parts of either half, and one kernel makes a part of both.
"""

import torch
from torch import Tensor

PARTS = 5
"""Of each half: the fewest that are more than `torch._inductor.config.max_pointwise_cat_inputs` together."""

ALIGNED = 64
"""Channels whose multiples parts begin at: a line of a GPU's memory in bf16. From places that are no multiples of 16 bytes, compiled code
would read and write single numbers, and not 16 bytes at once."""


def part_widths(width: int) -> list[int]:
    """Channels of each of PARTS parts of so many channels, or of fewer parts where there are fewer channels."""
    unit, count = ALIGNED if width >= PARTS * ALIGNED else 1, min(PARTS, width)
    starts = [part * (width // unit) // count * unit for part in range(count)]
    return [stop - start for start, stop in zip(starts, [*starts[1:], width], strict=True)]


class Halves(torch.autograd.Function):
    """[..., 2 m] -> its halves, [..., m] each, whose gradients are joined as parts.

    What is done with the halves is left to autograd: torch 2.11 keeps what a function of this kind computes in its forward pass even of
    a layer that is checkpointed, and of this one there is nothing to keep.
    """

    @staticmethod
    def forward(ctx, joined: Tensor) -> tuple[Tensor, Tensor]:
        return joined.chunk(2, dim=-1)

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor) -> Tensor:
        widths = part_widths(first.shape[-1])
        return torch.cat((*first.split(widths, dim=-1), *second.split(widths, dim=-1)), dim=-1)


def halves(joined: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2 m] -> its halves, [..., m] each."""
    return Halves.apply(joined) if torch.compiler.is_compiling() else joined.chunk(2, dim=-1)
