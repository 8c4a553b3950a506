"""The recurrent-depth model as a denoiser: one iteration maps a noised target and a noise level to next-token logits.

The target of position i is y_i, the unit-length embedding of its next token; the recurrent state is z = y + sigma * eps
(DiffusionBlocks for recurrent depth, arXiv 2506.14202, section 3 and appendix E.5). The clean past reaches a position through e;
the states of the past reach it through the core's attention, and hold only tokens that the position may know.
"""

import math

from torch import Tensor

from .cache import CacheSlot
from .noise import Preconditioning
from .recurrent import RecurrentDepthLM


def denoise(model: RecurrentDepthLM, z: Tensor, e: Tensor, sigma: Tensor, core_cache: list[CacheSlot] | None = None,
            coda_cache: list[CacheSlot] | None = None, block: int = 0) -> Tensor:
    """Logits [B, T, V] of the next tokens, from z and e [B, T, d] and noise levels sigma [B, 1] or [B, T] (fp32), which are `block`'s."""
    sigma_data = 1 / math.sqrt(model.config.width)
    scale = Preconditioning.at(sigma.unsqueeze(-1), sigma_data)
    conditioning = model.condition(scale.c_noise.squeeze(-1))
    hidden = model.iterate(scale.c_in * z, e, conditioning, core_cache, block)
    estimate = scale.c_skip * z + scale.c_out * hidden.float()
    return model.readout(estimate / sigma_data, conditioning, coda_cache)
