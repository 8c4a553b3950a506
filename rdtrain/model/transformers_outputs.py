"""What the class for transformers gives out."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .chain_cache import RecurrentDepthCache

CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
"""What transformers calls a cache: the one from 5.24 on, and the other before."""


@dataclass
class RecurrentDepthOutput(ModelOutput):
    """What `forward` returns.

    loss: mean cross-entropy in nats, where labels were given. logits: [B, T, V] without a cache, [B, 1, V] with one. past_key_values: the
    cache, which is `cache` as well from transformers 5.24 on. hidden_states: K + 1 latents, the state before the first iteration and after
    each, [B, T, d] without a cache and for an unrolled model, [B, 1, d] of the last position in a denoiser's chain (whose last one is the
    expected embedding). iteration_logits: K tensors, as logits, the last being those. iterations_used: int64 [B], where `exit` is set, of
    one token; None over a prompt, which has no exit.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "cache":
        cache: RecurrentDepthCache | None = None
    else:
        past_key_values: RecurrentDepthCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    iteration_logits: tuple[Tensor, ...] | None = None
    iterations_used: Tensor | None = None


@dataclass
class RecurrentDepthStep(ModelOutput):
    """One iteration by hand: the state after it [B, T, d], its logits [B, T, V], and the expected embedding under them [B, T, d]."""

    state: Tensor | None = None
    logits: Tensor | None = None
    estimate: Tensor | None = None
