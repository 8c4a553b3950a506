"""The recurrent-depth model as a denoiser: one iteration maps a noised target and a noise level to next-token logits.

The target of position i is y_i, the unit-length embedding of its next token; the recurrent state is z = y + sigma * eps
(DiffusionBlocks for recurrent depth, arXiv 2506.14202, section 3 and appendix E.5). The clean past reaches a position through e;
the states of the past reach it through the core's attention, and hold only tokens that the position may know.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from .cache import CacheSlot
from .layers import Conditioning, modulations
from .noise import Preconditioning
from .recurrent import RecurrentDepthLM


@dataclass
class NoiseLevel:
    """What an iteration needs of its noise levels, computed once where they are the same for many tokens.

    sigma [..., 1]; scale: the scalings at it, of its shape; into_core: what the state is multiplied with before the core; conditioning,
    of_coda: as `iterate` and `coda` take it.
    """

    sigma: Tensor
    scale: Preconditioning
    into_core: Tensor
    conditioning: Conditioning
    of_coda: Conditioning

    @classmethod
    def at(cls, model: RecurrentDepthLM, sigma: Tensor, sigma_data: float) -> "NoiseLevel":
        """sigma: [B, 1] or [B, T], fp32."""
        scale = Preconditioning.at(sigma.unsqueeze(-1), sigma_data)
        # c_skip * z, the Wiener estimate, fades where z is noise alone, which at unit variance would reach every layer beside e.
        into_core = scale.c_skip / sigma_data if model.config.wiener_input else scale.c_in
        conditioning = model.condition(scale.c_noise.squeeze(-1))
        return cls(sigma.unsqueeze(-1), scale, into_core, conditioning, conditioning)

    def of_layers(self, model: RecurrentDepthLM, block: int) -> "NoiseLevel":
        """The same, with what the layers of this block's core and of the coda make of it."""
        core, coda = (modulations(layers, self.conditioning) for layers in (model.cores[block].layers, model.coda_layers))
        return replace(self, conditioning=core, of_coda=coda)


def denoise_at(model: RecurrentDepthLM, z: Tensor, e: Tensor, level: NoiseLevel, sigma_data: float, cache: list[CacheSlot] | None = None,
               previous: Tensor | None = None, block: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`denoise_state` where the noise level is known beforehand: (state, evidence)."""
    hidden = model.iterate(level.into_core * z, e, level.conditioning, cache, previous, block, mask)
    evidence = (z / level.sigma.square()).detach() if model.config.posterior_readout else None
    if model.config.optional_state:
        return hidden.float(), evidence
    return (level.scale.c_skip * z + level.scale.c_out * hidden.float()) / sigma_data, evidence


def denoise_state(model: RecurrentDepthLM, z: Tensor, e: Tensor, sigma: Tensor, sigma_data: float,
                  cache: list[CacheSlot] | None = None, previous: Tensor | None = None,
                  block: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One iteration before its readout: z, e [B, T, d], noise levels sigma [B, 1] or [B, T] (fp32) -> (state, conditioning, evidence).

    The state [B, T, d] is the preconditioned estimate of the target in units of its standard deviation, or with optional_state the core's
    output alone; the three are what the model's
    `readout` and `losses` take, evidence being None for a model without posterior_readout. sigma_data: the standard deviation of the
    target's components that the scalings assume. previous: the estimate of the iteration before, as `iterate` takes it. block: the one
    whose noise levels these are. mask: `document_mask` of the inputs, where there is no cache.
    """
    level = NoiseLevel.at(model, sigma, sigma_data)
    state, evidence = denoise_at(model, z, e, level, sigma_data, cache, previous, block, mask)
    return state, level.conditioning, evidence


def denoise(model: RecurrentDepthLM, z: Tensor, e: Tensor, sigma: Tensor, sigma_data: float,
            core_cache: list[CacheSlot] | None = None, coda_cache: list[CacheSlot] | None = None,
            previous: Tensor | None = None, block: int = 0, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of the next tokens: `denoise_state` and the readout."""
    state, conditioning, evidence = denoise_state(model, z, e, sigma, sigma_data, core_cache, previous, block, mask)
    return model.readout(state, conditioning, coda_cache, evidence, mask)
