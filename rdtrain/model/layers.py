"""The layer of a recurrent-depth model: a sandwich block with rotary attention, gated MLP and an optional noise-level input.

Huginn's block (Geiping et al. 2025, arXiv 2502.05171): x = N2(x + attention(N1 x)); x = N4(x + mlp(N3 x)), RMSNorm throughout, no
biases. DiffusionBlocks (arXiv 2506.14202) brings the noise level in through adaptive norm: N1 and N3 get a scale and a shift that
are linear in the noise embedding and start at zero, so that a new block computes exactly what it would without them.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import causal_attention
from .cache import CacheSlot
from .checkpointing import LayerCheckpointing, checkpointed


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class RotaryTable:
    """Cosines and sines of the rotary embedding for all positions so far, in fp32 whatever the model's dtype.

    They are kept, because compiled layers would else compute them anew for every channel that they turn. Not a buffer of a module: that
    would be cast with its weights.
    """

    def __init__(self, head_width: int, base: float):
        self._head_width, self._base = head_width, base
        self._cos = self._sin = torch.empty(0, head_width // 2)

    def __call__(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[stop - start, head_width / 2] each. Reach the last position outside of compiled code first."""
        if stop > self._cos.shape[0] or self._cos.device != device:
            with torch.inference_mode(False):  # or training could not use them after a generation
                frequency = self._base ** -(torch.arange(0, self._head_width, 2, device=device, dtype=torch.float32) / self._head_width)
                angle = torch.outer(torch.arange(stop, device=device, dtype=torch.float32), frequency)
                self._cos, self._sin = angle.cos(), angle.sin()
        return self._cos[start:stop], self._sin[start:stop]


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x [B, H, T, D]: the pairs (x_i, x_{i + D/2}) are turned by their position's angle."""
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions, in the three parts that a layer calls: the middle one writes to a cache."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def inputs(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, D] of x [B, T, width], the first two with their positions."""
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        return rotate(query, rotary), rotate(key, rotary), value

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, slot: CacheSlot | None, mask: Tensor | None = None) -> Tensor:
        """What the positions of `inputs` see of themselves and of those in the slot, [B, H, T, D]."""
        if slot is not None:
            key, value = slot.append(key, value)
        return causal_attention(query, key, value, mask if slot is None else slot.place.mask)

    def outputs(self, seen: Tensor) -> Tensor:
        """[B, H, T, D] of `attend` -> [B, T, width]."""
        return self.output(seen.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """output(silu(gate(x)) * value(x)), gate and value in one matrix."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * mlp_width, bias=False)
        self.output = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class SandwichBlock(nn.Module):
    """One layer. With `conditioning_width`, its two input norms take the noise level through adaptive norm."""

    checkpointing: LayerCheckpointing = "none"
    """What a pass with gradient keeps of it (see checkpointing.py)."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float, conditioning_width: int | None = None):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.norm3, self.norm4 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attention = Attention(width, heads)
        self.mlp = GatedMLP(width, mlp_width)
        self.modulation = None if conditioning_width is None else nn.Linear(conditioning_width, 4 * width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], conditioning: Tensor | None = None,
                slot: CacheSlot | None = None, mask: Tensor | None = None) -> Tensor:
        """x: [B, T, width]; conditioning: [B, 1 or T, conditioning width], needed by a block that was built for it. mask: as
        `causal_attention` takes it; a slot has its own."""
        # In this order, so that what is compiled without gradient holds for both kinds of layer: torch keeps code for eight kinds of calls.
        if not torch.is_grad_enabled() or self.checkpointing == "none":
            return self._forward(x, rotary, conditioning, slot, mask)
        return checkpointed(self.checkpointing, self._forward, x, rotary, conditioning, slot, mask)

    def _forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], conditioning: Tensor | None, slot: CacheSlot | None,
                 mask: Tensor | None) -> Tensor:
        compiled = slot is not None and slot.place.compiled and slot.place.one_position
        before, after = compiled_parts() if compiled else (SandwichBlock.before_attention, SandwichBlock.after_attention)
        query, key, value, scale, shift = before(self, x, rotary, conditioning)
        return after(self, x, self.attention.attend(query, key, value, slot, mask), scale, shift)

    def before_attention(self, x: Tensor, rotary: tuple[Tensor, Tensor], conditioning: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values, and scale and shift of the MLP's input: all that the layer needs of its input but the sum."""
        attention_scale = attention_shift = mlp_scale = mlp_shift = 0.0
        if self.modulation is not None:
            attention_scale, attention_shift, mlp_scale, mlp_shift = self.modulation(conditioning).chunk(4, dim=-1)
        inputs = self.norm1(x) * (1 + attention_scale) + attention_shift
        return *self.attention.inputs(inputs, rotary), mlp_scale, mlp_shift

    def after_attention(self, x: Tensor, seen: Tensor, scale: Tensor | float, shift: Tensor | float) -> Tensor:
        """The layer's output, from its input and what attention has seen."""
        x = self.norm2(x + self.attention.outputs(seen))
        return self.norm4(x + self.mlp(self.norm3(x) * (1 + scale) + shift))


@functools.cache
def compiled_parts() -> tuple[Callable, Callable]:
    """What a layer does before and after attention, compiled, for all layers and models; the attention between them writes to a cache.

    Of more kinds of layers and batches in one process than torch keeps code for, it warns, and runs the others as they are.
    """
    return tuple(torch.compile(part) for part in (SandwichBlock.before_attention, SandwichBlock.after_attention))
