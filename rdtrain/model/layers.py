"""The layer of a recurrent-depth model: a sandwich block with rotary attention, gated MLP and an optional noise-level input.

Huginn's block (Geiping et al. 2025, arXiv 2502.05171): x = N2(x + attention(N1 x)); x = N4(x + mlp(N3 x)), RMSNorm throughout, no
biases. DiffusionBlocks (arXiv 2506.14202) brings the noise level in through adaptive norm: N1 and N3 get a scale and a shift that
are linear in the noise embedding and start at zero, so that a new block computes exactly what it would without them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend_from_one, causal_attention
from .cache import CacheSlot
from .checkpointing import LayerCheckpointing, checkpointed
from .compiled import multiply, once, spread
from .halves import halves

Modulation = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scale and shift of a layer's input norm before attention, and of that before the MLP, each [B, 1 or T, width]."""

Conditioning = Tensor | list[Modulation] | None
"""A noise level as layers take it: [B, 1 or T, conditioning width], or what each layer makes of it (`modulations`); None where they take
none."""


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


def rotate_pairs(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` for one position in compiled code: the same without joining two parts, so short that what reads it computes it instead."""
    cos, sin = (table.unsqueeze(-2) for table in rotary)
    pairs, signs = x.float().unflatten(-1, (2, -1)), torch.arange(-1, 2, 2, device=x.device).unsqueeze(-1)
    return (pairs * cos + pairs.flip(-2) * sin * signs).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], slot: CacheSlot | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, width], whose positions see themselves and those in the slot -> [B, T, width]."""
        batch, length, width = x.shape[0], x.shape[1], x.shape[-1]
        heads = multiply(x, self.query_key_value).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        compiled_step = slot is not None and slot.place.one_position and torch.compiler.is_compiling()
        turn = rotate_pairs if compiled_step else rotate
        query, key = turn(query, rotary), turn(key, rotary)
        if slot is not None:
            key, value = slot.append(key, value)
        if compiled_step:
            seen = attend_from_one(query, key, value, slot.place.mask)
        else:
            seen = causal_attention(query, key, value, mask if slot is None else slot.place.mask)
        return self.output(seen.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """output(silu(gate(x)) * value(x)), gate and value in one matrix."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * mlp_width, bias=False)
        self.output = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = halves(multiply(x, self.gate_value))
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

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], conditioning: Tensor | Modulation | None = None,
                slot: CacheSlot | None = None, mask: Tensor | None = None, followed: bool = False) -> Tensor:
        """x: [B, T, width]; conditioning: [B, 1 or T, conditioning width], needed by a block that was built for it, or what `modulate`
        makes of it. mask: as `causal_attention` takes it; a slot has its own.
        followed: whether the output goes into another layer in the same compiled code, which takes it as `spread` may have it."""
        # In this order, so that what is compiled without gradient holds for both kinds of layer: torch keeps code for eight kinds of calls.
        if not torch.is_grad_enabled() or self.checkpointing == "none":
            return self._forward(x, rotary, conditioning, slot, mask, followed)
        return checkpointed(self.checkpointing, self._forward, x, rotary, conditioning, slot, mask)

    def modulate(self, conditioning: Tensor) -> Modulation:
        """What a noise level makes of the layer's two input norms, for who runs it at the same one time and again."""
        return self.modulation(conditioning).chunk(4, dim=-1)

    def _forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], conditioning: Tensor | Modulation | None, slot: CacheSlot | None,
                 mask: Tensor | None, followed: bool = False) -> Tensor:
        attention_scale = attention_shift = mlp_scale = mlp_shift = 0.0
        if self.modulation is not None:
            known = self.modulate(conditioning) if isinstance(conditioning, Tensor) else conditioning
            attention_scale, attention_shift, mlp_scale, mlp_shift = known
        x = spread(x, self.attention.query_key_value)
        x = once(x) + self.attention(self.norm1(x) * (1 + attention_scale) + attention_shift, rotary, slot, mask)
        x = self.norm2(spread(x, self.mlp.gate_value))
        x = once(x) + self.mlp(self.norm3(x) * (1 + mlp_scale) + mlp_shift)
        return self.norm4(spread(x, self.attention.query_key_value if followed else None))


def modulations(layers: nn.ModuleList, conditioning: Tensor) -> list[Modulation]:
    """What each of some layers makes of a noise level."""
    return [layer.modulate(conditioning) for layer in layers]


def run_layers(rotary: RotaryTable, layers: nn.ModuleList, x: Tensor, conditioning: Conditioning,
               cache: list[CacheSlot] | None, mask: Tensor | None = None) -> Tensor:
    """Layers one after another, each with its slot of the cache, or all with one mask: x [B, T, d] -> [B, T, d]."""
    turns = cache[0].place.turns if cache else rotary(0, x.shape[1], x.device)
    joined = cache is not None and torch.compiler.is_compiling()
    for index, layer in enumerate(layers):
        own = conditioning[index] if isinstance(conditioning, list) else conditioning
        x = layer(x, turns, own, cache[index] if cache else None, mask, joined and index + 1 < len(layers))
    return x
