"""What the passes of a micro-batch hold, by arithmetic: tensors that wait for the backward pass, and those that the loss is taken with.

All of it is ESTIMATES, of two kinds of code: PyTorch's own, each operation of which saves what its backward pass wants, and compiled code,
whose partitioner chooses what to save and has the rest, which is cheap, computed again. docs/architecture.md derives both counts.
tests/test_dry_run.py and tests/test_compile.py hold them to what autograd saves on CPU, tests/test_measured_memory.py to what was allocated
on GPUs.
"""

import functools
from dataclasses import dataclass

import torch

from .config import Config
from .model.linear_cross_entropy import parts_of
from .model.recurrent import CONDITIONING_WIDTH, ModelConfig
from .objectives import Objective
from .objectives.bptt import BackpropagationThroughTime
from .objectives.depth import FixedDepth, PoissonDepth
from .objectives.diffusion_blocks import DiffusionBlocks
from .randomness import SampleRandom

FP32, BF16 = 4, 2
"""Bytes of a number."""

DEPTHS_LOOKED_AT = 100_000
"""Steps whose drawn depth is looked at for the largest."""


@dataclass
class Passes:
    """How passes compute, as far as it bears on what they hold.

    number: bytes of a number that is kept; stored: of one of the weights that run. device: `cuda` or `cpu`. compiled: whether by
    torch.compile; apart: and then, whether layers that an engine has hooks around are compiled each by itself; float8: and then, whether
    the layers' products take fp8.
    """

    number: int
    stored: int
    device: str
    compiled: bool = False
    apart: bool = False
    float8: bool = False

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Passes":
        """Those of a config's engine."""
        engine, number = config.engine, config.engine.dtype(device).itemsize
        casts = engine.name == "fsdp" or (engine.name == "deepspeed" and engine.zero_stage > 0)  # the others run fp32 under autocast
        apart = engine.compile and engine.name == "fsdp"
        return cls(number, number if casts else FP32, device.type, engine.compile, apart, engine.precision == "fp8")


def most_trained_iterations(objective: BackpropagationThroughTime, seed: int, steps: int) -> int:
    """The most iterations that carry gradient in any of a run's steps, or of its first DEPTHS_LOOKED_AT ones, where depths are drawn."""
    if isinstance(objective.depth, FixedDepth):
        return int(min(objective.depth.mean, objective.trained_limit))
    return _most_drawn(objective.iterations, objective.trained_limit, seed, min(steps, DEPTHS_LOOKED_AT))


@functools.lru_cache
def _most_drawn(iterations: int, limit: float, seed: int, steps: int) -> int:
    depth, cpu, most = PoissonDepth(iterations), torch.device("cpu"), 0
    for step in range(steps):
        most = max(most, depth.draw(SampleRandom(seed, (), cpu, step).of_step()))
        if most >= limit:
            return int(limit)
    return most


@dataclass
class _Kept:
    """Bytes for a token: of a layer, and of one that takes a noise level; of a checkpointed one; of a layer's input, where that is a tensor
    of its own; and of the two norms around the coda."""

    layer: float
    conditioned: float
    checkpointed: float
    input: float
    norms: float


def _norm(width: int, device: str) -> int:
    """Of a norm that is not compiled; on CPU the normalised fp32 values are kept as well."""
    return (2 if device == "cpu" else 1) * FP32 * width


def _level_per_token(objective: Objective) -> bool:
    return isinstance(objective, DiffusionBlocks) and objective.settings.level_per == "token"


def _kept(model: ModelConfig, objective: Objective, passes: Passes) -> _Kept:
    width, mlp, number, sums = model.width, model.mlp_width, passes.number, FP32 * model.heads
    scales = 2 * number * width * _level_per_token(objective)  # one level for a sequence makes one of each, which is nothing
    checkpointed = number * (6 * width + 2 * mlp) + sums if objective.layer_checkpointing == "selective" else 0
    if passes.compiled:  # of its norms the two sums after attention and MLP, and a number for each: all is scaled again from these
        layer = number * (11 * width + 3 * mlp) + 4 * FP32 + sums
        if passes.float8:  # what goes into the four products is rounded anew, from what it was made of
            layer -= number * (3 * width + mlp)
        return _Kept(layer, layer + scales, checkpointed, number * width, 2 * FP32)
    norm = _norm(width, passes.device)
    layer = 4 * norm + number * (9 * width + 4 * mlp) + sums
    scaled = 2 * number * width if model.noise_conditioning else 0
    return _Kept(layer, layer + scaled + scales, checkpointed, number * width, 2 * norm)


def _checkpointed_layers(model: ModelConfig, objective: Objective) -> list[range]:
    """Those of prelude, core and coda."""
    if objective.layer_checkpointing == "none":
        return [range(0)] * 3
    return model.checkpointed_layers(objective.layer_checkpointing_interval)


def _layer_bytes(kept: _Kept, each: float, count: int, checkpointed: range, passes: Passes, apart: bool) -> float:
    """Of all layers of a part. each: of one that is not checkpointed; apart: whether they are compiled each by itself.

    Uncompiled, a checkpointed one keeps its input, and another has it among what its norms keep. Compiled code keeps the part's input and
    those between two checkpointed layers, as there are with interval 1 alone, and makes the others again with the layer before them. (In
    BPTT's core one was seen to be kept in fp32, the second layer's where the first is checkpointed and it is not.) Compiled by itself, each
    layer keeps its input.
    """
    if passes.compiled:
        inputs = count if apart or len(checkpointed) == count else 1
    else:
        inputs = len(checkpointed)
    return (count - len(checkpointed)) * each + len(checkpointed) * kept.checkpointed + inputs * kept.input


def readout_bytes(model: ModelConfig, objective: Objective, passes: Passes) -> float:
    """An estimate of what coda and head save of that, for each token: what the backward pass is done with first."""
    kept, (_, _, coda) = _kept(model, objective, passes), _checkpointed_layers(model, objective)
    layers = _layer_bytes(kept, kept.conditioned, model.coda_layers, coda, passes, passes.apart)
    return layers + kept.norms + passes.number * model.width


def activation_bytes(model: ModelConfig, objective: Objective, passes: Passes, seed: int, steps: int) -> float:
    """An estimate of the bytes that a forward pass saves for its backward pass, for each token of a micro-batch, and of what the latter
    computes again of a layer while all of that is there; what does not grow with tokens, the gradient of the embedding, apart."""
    width, number, unrolled = model.width, passes.number, isinstance(objective, BackpropagationThroughTime)
    again = unrolled and objective.activation_checkpointing
    kept, (prelude, core, coda) = _kept(model, objective, passes), _checkpointed_layers(model, objective)
    apart = passes.apart and not objective.repeats_core
    iteration = 2 * number * width + _layer_bytes(kept, kept.conditioned, model.core_layers, core, passes, apart)
    once = _layer_bytes(kept, kept.layer, model.prelude_layers, prelude, passes, passes.apart) + readout_bytes(model, objective, passes)
    # A last layer that is checkpointed is computed again before anything is let go of, in the coda or in an iteration that is there alone;
    # an earlier one has less inside than a later layer has let go of.
    if model.core_layers - 1 in core if again else model.coda_layers - 1 in coda:
        once += kept.conditioned - kept.checkpointed - kept.input
    if passes.apart:  # both inputs of the norm around the coda
        once += 2 * number * width
    if unrolled:
        depth = most_trained_iterations(objective, seed, steps)
        return once + (depth * number * width + iteration if again else depth * iteration)
    if model.noise_conditioning:
        once += (passes.stored if passes.compiled else FP32) * width  # the targets' embeddings
    if _level_per_token(objective):  # its embedding, on the way
        once += 5 * number * CONDITIONING_WIDTH
    if model.self_conditioning:
        once += number * width
    if model.core_readout:
        once += _norm(width, passes.device) + 2 * number * width  # which no engine compiles
    return once + iteration


def mask_bytes(model: ModelConfig, number: int, tokens: int, sequence_length: int) -> int:
    """Bytes of the one mask that keeps documents apart, for a micro-batch of so many tokens in sequences of that length."""
    return 0 if model.document_mark is None else number * tokens * sequence_length


def loss_bytes(model: ModelConfig, objective: Objective, passes: Passes, tokens: int) -> int:
    """An estimate of the bytes that are there besides activations while the loss of a micro-batch of so many tokens is taken, and gone once
    it has been: logits of a part of the tokens, the sum of the embedding's gradient where that is kept in fewer bytes, and what an
    objective holds until it returns."""
    width, number, fp32 = model.width, passes.number, FP32 * model.width
    part = parts_of(tokens, model.vocab_size)[0].stop * model.vocab_size
    if passes.compiled:  # the product and its gradient; what is between them is never written
        logits = number * (2 + model.posterior_readout) * part
    else:
        logits = (2 * FP32 + (number if number != FP32 and model.posterior_readout else 0)) * part
    each = 2 * number * width  # what prelude and coda returned
    if isinstance(objective, DiffusionBlocks):
        each += 3 * fp32  # targets, noise, and both together
        cast = number != FP32
        each += fp32 * cast  # the core's output, which is what it was in fp32
        each += (fp32 + number * width * cast) * model.posterior_readout
        each += fp32 * (model.self_conditioning + (model.self_conditioning or objective.chain_states))  # of the earlier iteration
    return logits + (FP32 - passes.stored) * model.vocab_size * width + each * tokens


def embedding_gradient_bytes(model: ModelConfig, stored: int) -> int:
    """Bytes of the embedding's gradients that wait for the backward pass, one of each readout."""
    return (1 + model.core_readout) * stored * model.vocab_size * model.width
