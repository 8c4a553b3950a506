"""What a run will need, by arithmetic alone: memory of each rank, traffic of a step, size of a checkpoint. Nothing here runs the model.

Weights, gradients, optimizer state and traffic follow from the parameters' shapes and from what each engine keeps and sends, as was
measured by counting its tensors and its collectives (tests/distributed/estimate_process.py repeats that). Activations and logits are
ESTIMATES: the tensors that PyTorch, uncompiled, saves for the backward pass of each layer, per token. docs/architecture.md derives both.

The largest rank counts: what ranks share unevenly, rank 0 has the most of.
"""

import functools
import math
from dataclasses import dataclass

import torch

from .config import Config
from .distributed import World
from .engine.deepspeed_config import BUCKET, LIVE, PERSISTENT
from .model.layers import SandwichBlock
from .model.linear_cross_entropy import parts_of
from .model.recurrent import ModelConfig, RecurrentDepthLM
from .objectives import Objective
from .objectives.bptt import BackpropagationThroughTime
from .objectives.depth import FixedDepth, PoissonDepth
from .optimization import build_optimizer
from .randomness import SampleRandom

FP32, BF16 = 4, 2
"""Bytes of a number."""

DEPTHS_LOOKED_AT = 100_000
"""Steps whose drawn depth is looked at for the largest."""


def model_on_paper(config: ModelConfig) -> RecurrentDepthLM:
    """The model with all shapes and no storage (torch's meta device)."""
    with torch.device("meta"):
        return RecurrentDepthLM(config)


def parameters_by_part(model: RecurrentDepthLM) -> dict[str, int]:
    """Parameters of embedding, prelude, core (all blocks), coda and the rest (noise level, last norms); they add up to the model's."""
    parts = dict.fromkeys(("embedding", "prelude", "core", "coda", "rest"), 0)
    names = {"embedding": "embedding", "prelude_layers": "prelude", "cores": "core", "coda_layers": "coda"}
    for name, parameter in model.named_parameters():
        parts[names.get(name.split(".")[0], "rest")] += parameter.numel()
    return parts


@dataclass
class Shares:
    """How many parameters a rank has to keep, by what they are to an engine.

    whole: all of the model's.
    part: this rank's share, as the engine cuts and pads it.
    largest_part: of the optimizer's group that is largest.
    active: all but those of blocks that a step leaves idle.
    active_part: this rank's share of them, where the engine cuts each parameter.
    persistent: those that ZeRO-3 leaves whole once it has gathered them.
    core: of the cores.
    largest: of the largest parameter.
    root: FSDP: what stays gathered from the start of a pass to its end.
    layers: FSDP: what is gathered for each layer, and again for its backward pass; of the active block alone.
    largest_layer: FSDP: one such layer.
    """

    whole: int
    part: int
    largest_part: int
    active: int
    active_part: int
    persistent: int
    core: int
    largest: int
    root: int
    layers: int
    largest_layer: int

    @classmethod
    def of(cls, model: RecurrentDepthLM, config: Config, objective: Objective, ranks: int) -> "Shares":
        """Of a model under a config's engine on so many ranks; the model may be on paper."""
        engine = config.engine
        idle = {id(parameter) for core in model.cores[1:] for parameter in core.parameters()}
        everything = list(model.parameters())
        groups = [group["params"] for group in build_optimizer(model, config.optimizer).param_groups]
        if engine.name == "fsdp":  # rows of each parameter
            def share(parameter):
                return math.ceil(parameter.shape[0] / ranks) * (parameter.numel() // parameter.shape[0])
        elif engine.name == "deepspeed" and engine.zero_stage == 3:  # elements of each parameter
            def share(parameter):
                return math.ceil(parameter.numel() / ranks)
        else:
            def share(parameter):
                return parameter.numel()
        if engine.name == "deepspeed" and engine.zero_stage in (1, 2):  # elements of each group, cut at even ones
            parts = [2 * math.ceil(sum(parameter.numel() for parameter in group) / (2 * ranks)) for group in groups]
        else:
            parts = [sum(map(share, group)) for group in groups]
        repeated = set(model.cores.modules()) if objective.repeats_core else set()
        layers = [module for module in model.modules() if isinstance(module, SandwichBlock) and module not in repeated]
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        idle_layers = sum(size for layer, size in zip(layers, sizes) if id(next(layer.parameters())) in idle)
        whole = sum(parameter.numel() for parameter in everything)
        return cls(
            whole=whole,
            part=sum(parts),
            largest_part=max(parts),
            active=sum(parameter.numel() for parameter in everything if id(parameter) not in idle),
            active_part=sum(share(parameter) for parameter in everything if id(parameter) not in idle),
            persistent=sum(parameter.numel() for parameter in everything if parameter.numel() <= PERSISTENT),
            core=sum(parameter.numel() for parameter in model.cores.parameters()),
            largest=max(parameter.numel() for parameter in everything),
            root=whole - sum(sizes),
            layers=sum(sizes) - idle_layers,
            largest_layer=max(sizes, default=0),
        )


@dataclass
class Memory:
    """Bytes that one rank holds at the end of a step's last backward pass, by kind; with offload_optimizer `host_` is in the CPU's memory.

    weights: those that run and, where they are not the same, the fp32 ones that are stepped.
    gradients: the most that is held at a time, fp32 sums over micro-batches included.
    optimizer_state: both moments of AdamW.
    gathered: whole weights for a pass: copies that torch.autocast, FSDP or ZeRO-3 makes.
    messages: buffers that gradients are sent from, or are put together in.
    activations, logits: estimates; see `activation_bytes` and `logit_bytes`.
    embedding_gradients: two of the tied embedding's, as input and as head, which a backward pass adds last.
    """

    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    gathered: int = 0
    messages: int = 0
    activations: int = 0
    logits: int = 0
    embedding_gradients: int = 0
    host_weights: int = 0
    host_gradients: int = 0
    host_optimizer_state: int = 0

    @property
    def passes(self) -> int:
        """What the passes of a micro-batch take, gradients apart."""
        return self.activations + self.logits + self.gathered

    def peak(self, accumulation: int) -> int:
        """The most in the device's memory at any moment of a step of so many micro-batches. Gradients come as activations go, so with one
        micro-batch they are no further term; a later one finds those of the first there."""
        in_passes = self.passes + (self.gradients if accumulation > 1 else 0)
        return self.weights + self.optimizer_state + self.messages + max(in_passes, self.gradients + self.embedding_gradients)

    @property
    def host_bytes(self) -> int:
        """What offload_optimizer puts into the CPU's memory."""
        return self.host_weights + self.host_gradients + self.host_optimizer_state


def engine_memory(shares: Shares, config: Config, number: int, accumulation: int) -> Memory:
    """Weights, gradients, optimizer state, gathered copies and message buffers of a rank.

    number: bytes of a number that passes compute in. Activations and logits are left at 0.
    """
    engine, whole, part = config.engine, shares.whole, shares.part
    if engine.name == "torch":
        return Memory(
            weights=FP32 * whole, gradients=FP32 * shares.active, optimizer_state=2 * FP32 * whole,
            gathered=BF16 * whole if number == BF16 else 0,
        )
    if engine.name == "fsdp":
        held = shares.root + 2 * shares.largest_layer  # one layer runs while the next is gathered
        return Memory(
            weights=FP32 * part, gradients=FP32 * shares.active_part, optimizer_state=2 * FP32 * part,
            gathered=2 * number * held,  # and their gradients, until these are reduced
            messages=FP32 * max(shares.root, shares.largest_layer),
        )
    if engine.name == "block_parallel":  # the shared parts and one core; gradients lie in the two messages of a step
        held = shares.active
        return Memory(
            weights=FP32 * held, gradients=FP32 * (held + 1), optimizer_state=2 * FP32 * held,
            gathered=BF16 * held if number == BF16 else 0,
        )
    stage = engine.zero_stage
    if stage == 0:
        return Memory(
            weights=FP32 * whole, gradients=FP32 * whole, optimizer_state=2 * FP32 * whole,
            gathered=BF16 * whole if number == BF16 else 0, messages=FP32 * min(BUCKET, whole),
        )
    run = number * (part + shares.persistent if stage == 3 else whole)
    gathered = number * min(LIVE, whole) if stage == 3 else 0
    stepped, moments = FP32 * part, 2 * FP32 * part
    if engine.offload_optimizer:
        sums = 1 if stage == 1 or (stage == 2 and number == FP32 and accumulation == 1) else 2
        between = {1: FP32 * whole if accumulation > 1 else number * whole}.get(stage, 0)
        staged = number * (part + 2 * shares.largest) if stage < 3 else 0  # on the way to the CPU and back
        return Memory(
            weights=run, gradients=between + staged, gathered=gathered,
            messages={1: FP32, 2: 2 * number, 3: number}[stage] * BUCKET,
            host_weights=stepped, host_gradients=sums * FP32 * part, host_optimizer_state=moments,
        )
    if stage == 1 and number == BF16:  # a whole fp32 sum, to which each micro-batch's bf16 gradient is added
        gradients, messages = FP32 * whole + BF16 * shares.active, BF16 * min(BUCKET, whole)
    elif stage == 1:  # whole until the last micro-batch; the optimizer's step copies this rank's part
        gradients, messages = FP32 * max(shares.active, 2 * part), FP32 * BUCKET
    elif stage == 2:
        gradients, messages = FP32 * part * (1 if number == BF16 else 2), 2 * number * BUCKET
    else:  # the step copies a group at a time
        gradients, messages = FP32 * (part + shares.largest_part), number * BUCKET
    return Memory(
        weights=run + stepped, gradients=gradients, optimizer_state=moments, gathered=gathered, messages=messages
    )


@dataclass
class Traffic:
    """Bytes that one rank sends in a step (and receives as many), by kind of collective, as rings send them."""

    all_reduce: float = 0
    all_gather: float = 0
    reduce_scatter: float = 0

    @property
    def bytes(self) -> float:
        """Of all kinds."""
        return self.all_reduce + self.all_gather + self.reduce_scatter


def step_traffic(shares: Shares, config: Config, objective: Objective, number: int, accumulation: int, ranks: int) -> Traffic:
    """What one optimizer step makes a rank send. A ring sends (N - 1) / N of a message for each all-gather and reduce-scatter, and twice
    that for an all-reduce. Sums for metrics and norms, a few numbers each, are left out."""
    engine, whole, ring = config.engine, shares.whole, (ranks - 1) / ranks
    if engine.name == "torch":
        return Traffic()
    if engine.name == "fsdp":
        return Traffic(
            all_gather=accumulation * number * (shares.root + 2 * shares.layers) * ring,
            reduce_scatter=accumulation * FP32 * shares.active * ring,
        )
    if engine.name == "block_parallel":  # the core's gradient stays in its group; one number more for the norm
        core, group = shares.core // config.model.blocks, ranks // config.model.blocks
        return Traffic(all_reduce=2 * FP32 * (core * (group - 1) / group + (shares.active - core + 1) * ring))
    stage = engine.zero_stage
    if stage == 0:
        return Traffic(all_reduce=2 * FP32 * whole * ring)
    if stage < 3:  # both reduce by all-reduce, and stage 2 for each micro-batch
        reduced = whole if stage == 1 and number == BF16 else shares.active
        times = accumulation if stage == 2 else 1
        return Traffic(all_reduce=2 * times * number * reduced * ring, all_gather=number * whole * ring)
    kept = shares.persistent + (shares.core if objective.repeats_core else 0)
    again = 1 if whole <= LIVE else 2  # what was dropped after the forward pass is gathered for the backward one
    gathered = shares.active + (again * accumulation - 1) * max(0, shares.active - kept)
    return Traffic(all_gather=number * gathered * ring, reduce_scatter=accumulation * number * shares.active * ring)


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


def activation_bytes(model: ModelConfig, objective: Objective, number: int, device: str, seed: int, steps: int) -> float:
    """An estimate of the bytes that a forward pass saves for its backward pass, for each token of a micro-batch; logits apart.

    number: bytes of a number that passes compute in; device: `cuda` or `cpu`.
    """
    width, norm = model.width, (2 if device == "cpu" else 1) * FP32 * model.width  # on CPU the normalised fp32 values are kept as well
    attention = (9 if device == "cpu" else 8) * number * width + FP32 * model.heads
    layer = 4 * norm + attention + 4 * number * model.mlp_width
    conditioned, inside = layer + (2 * number * width if model.noise_conditioning else 0), 0
    if objective.layer_checkpointing != "none":  # the inside of one layer is there while its backward pass runs
        products = number * (6 * width + 2 * model.mlp_width) + FP32 * model.heads if objective.layer_checkpointing == "selective" else 0
        kept = number * width + products
        layer, conditioned, inside = kept, kept, conditioned - kept
    iteration = 2 * number * width + model.core_layers * conditioned
    readout = model.coda_layers * conditioned + 2 * norm + number * width
    once = model.prelude_layers * layer + readout + inside
    if isinstance(objective, BackpropagationThroughTime):
        depth = most_trained_iterations(objective, seed, steps)
        return once + (depth * number * width + iteration if objective.activation_checkpointing else depth * iteration)
    if model.noise_conditioning:
        once += FP32 * width  # the targets' embeddings
    if model.self_conditioning:
        once += number * width
    if model.core_readout:
        once += norm + 2 * number * width
    return once + iteration


def mask_bytes(model: ModelConfig, number: int, tokens: int, sequence_length: int) -> int:
    """Bytes of the one mask that keeps documents apart, for a micro-batch of so many tokens in sequences of that length."""
    return 0 if model.document_mark is None else number * tokens * sequence_length


def logit_bytes(model: ModelConfig, number: int, tokens: int) -> int:
    """An estimate of the bytes of the logits of a micro-batch of so many tokens, where they take the most: those of the part of the tokens
    whose loss is taken at a time, and the sum of the embedding's gradient, which waits for the backward pass."""
    part = parts_of(tokens, model.vocab_size)[0].stop * model.vocab_size
    logits = (2 * FP32 + (number if number != FP32 and model.posterior_readout else 0)) * part
    return logits + FP32 * model.vocab_size * model.width * (2 if model.core_readout else 1)


def rank_memory(shares: Shares, model: ModelConfig, config: Config, objective: Objective, world: World, steps: int) -> Memory:
    """All that a rank holds, of a run of so many steps; of the world only its size and its kind of device matter. UserError where the
    global batch cannot be shared evenly."""
    number, accumulation = config.engine.dtype(world.device).itemsize, config.batch.accumulation(world.size)
    tokens = config.batch.micro_sequences * config.data.sequence_length
    memory = engine_memory(shares, config, number, accumulation)
    memory.activations = round(tokens * activation_bytes(model, objective, number, world.device.type, config.run.seed, steps))
    memory.activations += mask_bytes(model, number, tokens, config.data.sequence_length)
    memory.logits = logit_bytes(model, number, tokens)
    memory.embedding_gradients = 2 * FP32 * model.vocab_size * model.width
    return memory


def checkpoint_bytes(shares: Shares, config: Config, number: int) -> int:
    """Bytes of a checkpoint: fp32 weights and moments for resuming, and the weights for export."""
    stored = BF16 if number == BF16 and config.engine.name == "deepspeed" and config.engine.zero_stage > 0 else FP32
    return (3 * FP32 + stored) * shares.whole
