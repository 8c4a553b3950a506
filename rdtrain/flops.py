"""Counts of floating-point operations, honest about recurrence.

Conventions: a multiply-add is two operations; attention is counted over all T positions of a sequence (as torch's FlopCounterMode
counts it), although a causal kernel may skip half; norms, activations and the softmax are left out; a backward pass costs twice
its forward pass, so a part that carries gradient counts three times and one that runs without gradient counts once. What activation
checkpointing computes again is no operation of the model, and is left out.
"""

from dataclasses import dataclass

from .model.checkpointing import LayerCheckpointing
from .model.recurrent import CONDITIONING_WIDTH, ModelConfig


@dataclass
class ForwardFlops:
    """Operations of one forward pass per token, for each method of the model."""

    prelude: float
    iterate: float
    readout: float
    head: float
    """The part of the readout that makes logits; an expected embedding costs the same."""
    condition: float
    """The noise embedding and every layer's modulation, for one noise level per sequence."""
    layer: float
    """One layer, without its modulation."""
    modulation: float
    """That of one layer, for one noise level per sequence; 0 in a model without noise levels."""


def forward_flops(config: ModelConfig, sequence_length: int) -> ForwardFlops:
    """Operations per token of one pass over sequences of `sequence_length` tokens."""
    width = config.width
    layer = 2 * (4 * width**2 + 3 * width * config.mlp_width) + 4 * sequence_length * width
    condition = modulation = 0.0
    if config.noise_conditioning:
        modulation = 2 * CONDITIONING_WIDTH * 4 * width / sequence_length
        condition = 2 * 2 * CONDITIONING_WIDTH**2 / sequence_length + (config.core_layers + config.coda_layers) * modulation
    return ForwardFlops(
        prelude=config.prelude_layers * layer,
        iterate=2 * (2 * width) * width + config.core_layers * layer,
        readout=config.coda_layers * layer + 2 * width * config.vocab_size,
        head=2 * width * config.vocab_size,
        condition=condition,
        layer=layer,
        modulation=modulation,
    )


def recomputed_in_layers(config: ModelConfig, sequence_length: int, checkpointing: LayerCheckpointing, interval: int, iterations: float = 1,
                         levels: int = 1) -> float:
    """Operations per token that layers make once more in a backward pass, by what every interval-th keeps (model/checkpointing.py).

    iterations: passes of the core that carry gradient; levels: noise levels per sequence. `selective` keeps all products but modulation's.
    """
    parts = forward_flops(config, sequence_length)
    prelude, core, coda = (len(layers) for layers in config.checkpointed_layers(interval))
    again = levels * (iterations * core + coda) * parts.modulation
    if checkpointing == "full":
        again += (prelude + iterations * core + coda) * parts.layer
    return 0.0 if checkpointing == "none" else again


def generation_flops(config: ModelConfig, iterations: int, length: int) -> float:
    """Operations that generating one token of a single text costs, which attends to `length` positions, with a cache of its own for each
    iteration.

    A denoising model reads out at every iteration, adds the evidence of its state, and makes the expected embedding of all iterations but
    the last; what a noise level modulates is known before. Self-conditioning is not counted.
    """
    parts = forward_flops(config, length)
    if not config.noise_conditioning:
        return parts.prelude + iterations * parts.iterate + parts.readout
    heads = iterations - 1 + (iterations if config.posterior_readout else 0)
    return parts.prelude + iterations * (parts.iterate + parts.readout) + heads * parts.head
