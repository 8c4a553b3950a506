"""What a run will need, by arithmetic alone: memory of each rank, traffic of a step, size of a checkpoint. Nothing here runs the model.

Weights, gradients, optimizer state and traffic follow from the parameters' shapes and from what each engine keeps and sends, as was
measured by counting its tensors and its collectives (tests/distributed/estimate_process.py repeats that). What passes hold is an ESTIMATE,
which activations.py makes, of compiled code where engine.compile is on. docs/architecture.md derives all of it.

The largest rank counts: what ranks share unevenly, rank 0 has the most of.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .activations import (
    BF16,
    FP32,
    Passes,
    activation_bytes,
    embedding_gradient_bytes,
    loss_bytes,
    mask_bytes,
    most_trained_iterations,
    readout_bytes,
)
from .config import Config
from .distributed import World
from .engine.deepspeed_config import BUCKET, LIVE, PERSISTENT
from .engine.float8 import multiplied_in_float8
from .model.layers import SandwichBlock
from .model.recurrent import ModelConfig, RecurrentDepthLM
from .objectives import Objective
from .objectives.bptt import BackpropagationThroughTime
from .optimization import build_optimizer


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
    summed: BF16 ZeRO-1: of the groups that are reduced in one message, where these are most. It cuts messages between groups alone.
    active: all but those of blocks that a step leaves idle.
    active_part: this rank's share of them, where the engine cuts each parameter.
    persistent: those that ZeRO-3 leaves whole once it has gathered them.
    core: of the cores.
    coda: of the coda's layers, whose gradients come first.
    products: of those maps that engine.precision=fp8 has multiply in fp8; of the active block alone.
    largest: of the largest parameter.
    root: FSDP: what stays gathered from the start of a pass to its end.
    layers: FSDP: what is gathered for each layer, and again for its backward pass; of the active block alone.
    largest_layer: FSDP: one such layer.
    """

    whole: int
    part: int
    largest_part: int
    summed: int
    active: int
    active_part: int
    persistent: int
    core: int
    coda: int
    products: int
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
        products = [linear.weight for linear in multiplied_in_float8(model)]
        messages = [0]
        for group in groups:
            messages[-1] += sum(parameter.numel() for parameter in group)
            messages += [0] * (messages[-1] > BUCKET)
        return cls(
            whole=whole,
            part=sum(parts),
            largest_part=max(parts),
            summed=max(messages),
            active=sum(parameter.numel() for parameter in everything if id(parameter) not in idle),
            active_part=sum(share(parameter) for parameter in everything if id(parameter) not in idle),
            persistent=sum(parameter.numel() for parameter in everything if parameter.numel() <= PERSISTENT),
            core=sum(parameter.numel() for parameter in model.cores.parameters()),
            coda=sum(parameter.numel() for parameter in model.coda_layers.parameters()),
            products=sum(weight.numel() for weight in products if id(weight) not in idle),
            largest=max(parameter.numel() for parameter in everything),
            root=whole - sum(sizes),
            layers=sum(sizes) - idle_layers,
            largest_layer=max(sizes, default=0),
        )


@dataclass
class Memory:
    """Bytes that one rank holds in a step, by kind; with offload_optimizer `host_` is in the CPU's memory.

    weights: those that run and, where they are not the same, the fp32 ones that are stepped.
    gradients: the most that is held at a time, fp32 sums over micro-batches and those that CUDA graphs write to included.
    optimizer_state: both moments of AdamW.
    gathered: whole weights for a pass: copies that torch.autocast, FSDP or ZeRO-3 makes. One of each weight, also of a core that runs many
        times over: autocast in compiled code would keep one for each of these, so there model/weight_copies.py makes them.
    messages: buffers that gradients are sent from, or are put together in.
    activations: an estimate of what a forward pass leaves for its backward pass.
    loss: an estimate of what is there besides while the loss is taken, logits above all.
    repeated: of BPTT with checkpointed iterations, one of which `activations` has with its inside: the gradients of core and coda, which
        are there besides once the second iteration is computed again, less what the coda had kept. Of plain PyTorch, where it was measured.
    embedding_gradients: two of the tied embedding's, as input and as head, which a backward pass adds last.
    standing: of the gradients, what is allocated before there are any.
    at_first_message: ZeRO-2: what passes, gradients and messages take when the first message is full and the sums are allocated.
    messages_come: when messages do: `standing` are always there, `early` ones come with the first gradient, `late` ones with the last, and
        `after` ones once gradients are added up.
    """

    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    gathered: int = 0
    messages: int = 0
    activations: int = 0
    loss: int = 0
    repeated: int = 0
    embedding_gradients: int = 0
    host_weights: int = 0
    host_gradients: int = 0
    host_optimizer_state: int = 0
    standing: int = 0
    at_first_message: int = 0
    messages_come: Literal["standing", "early", "late", "after"] = "late"

    @property
    def kinds(self) -> dict[str, int]:
        """Each kind by its name; `standing` and `repeated` are among the gradients."""
        moments = ("standing", "repeated", "at_first_message", "messages_come")
        return {name: value for name, value in vars(self).items() if name not in moments}

    @property
    def passes(self) -> int:
        """What the passes of a micro-batch take, messages and the gradients of earlier ones apart: the most of it is there as the loss is
        taken, or as a checkpointed iteration is computed again."""
        return self.activations + max(self.loss, self.repeated) + self.gathered

    def peak(self, accumulation: int) -> int:
        """The most in the device's memory at any moment of a step of so many micro-batches. Gradients come as activations go, so with one
        micro-batch they are no further term but where they are standing; a later one finds those of the first there. The first gradient
        finds nearly all activations, and nothing of the loss any more."""
        standing, early = (self.messages if self.messages_come == when else 0 for when in ("standing", "early"))
        before = self.gradients if accumulation > 1 else self.standing
        in_passes = self.activations + self.gathered + max(self.loss + before, early + before, self.repeated + self.standing)
        last = (self.embedding_gradients, self.messages)
        at_end = self.gradients + (max(last) if self.messages_come == "after" else sum(last))
        return self.weights + self.optimizer_state + max(in_passes + standing, at_end, self.at_first_message)

    @property
    def host_bytes(self) -> int:
        """What offload_optimizer puts into the CPU's memory."""
        return self.host_weights + self.host_gradients + self.host_optimizer_state


def engine_memory(shares: Shares, config: Config, number: int, accumulation: int) -> Memory:
    """Weights, gradients, optimizer state, gathered copies and message buffers of a rank.

    number: bytes of a number that passes compute in. What follows from the micro-batch is left at 0.
    """
    engine, whole, part = config.engine, shares.whole, shares.part
    in_float8 = shares.products if engine.precision == "fp8" else 0  # rounded where they are used, and not kept
    if engine.name == "torch":
        return Memory(
            weights=FP32 * whole, gradients=FP32 * shares.active, optimizer_state=2 * FP32 * whole,
            gathered=BF16 * (whole - in_float8) if number == BF16 else 0,
        )
    if engine.name == "fsdp":
        held = shares.root + 2 * shares.largest_layer  # one layer runs while the next is gathered
        return Memory(
            weights=FP32 * part, gradients=FP32 * shares.active_part, optimizer_state=2 * FP32 * part,
            gathered=number * held,
            messages=number * held + FP32 * max(shares.root, shares.largest_layer),  # whole gradients, and those that are reduced
        )
    if engine.name == "block_parallel":  # the shared parts and one core; gradients lie in the two messages of a step
        held = shares.active
        return Memory(
            weights=FP32 * held, gradients=FP32 * (held + 1), optimizer_state=2 * FP32 * held,
            gathered=BF16 * (held - in_float8) if number == BF16 else 0, standing=FP32 * (held + 1),
        )
    stage = engine.zero_stage
    if stage == 0:
        return Memory(
            weights=FP32 * whole, gradients=FP32 * whole, optimizer_state=2 * FP32 * whole,
            gathered=BF16 * (whole - in_float8) if number == BF16 else 0, messages=FP32 * min(BUCKET, whole),
        )
    run = number * (part + shares.persistent if stage == 3 else whole)
    gathered = number * min(LIVE, whole) if stage == 3 and part < whole else 0  # one rank runs its part as it is
    stepped, moments = FP32 * part, 2 * FP32 * part
    if engine.offload_optimizer:
        sums = 1 if stage == 1 or (stage == 2 and number == FP32 and accumulation == 1) else 2
        between = {1: FP32 * whole if accumulation > 1 else number * whole}.get(stage, 0)
        staged = number * (part + 2 * shares.largest) if stage < 3 else 0  # on the way to the CPU and back
        return Memory(
            weights=run, gradients=between + staged, gathered=gathered,
            messages={1: FP32, 2: 2 * number, 3: number}[stage] * BUCKET, messages_come="standing" if stage == 3 else "early",
            host_weights=stepped, host_gradients=sums * FP32 * part, host_optimizer_state=moments,
        )
    standing, come = 0, "early"
    if stage == 1 and number == BF16:  # a whole fp32 sum, which is never freed, and to which each micro-batch's bf16 gradient is added
        standing, come = FP32 * whole, "after"  # a message is put together in fp32, and copied in bf16
        gradients, messages = standing + BF16 * shares.active, (FP32 + BF16) * shares.summed
    elif stage == 1:  # whole until the last micro-batch; the optimizer's step copies this rank's part
        gradients, messages = FP32 * max(shares.active, 2 * part), FP32 * BUCKET
    elif stage == 2:
        gradients, messages = FP32 * part * (1 if number == BF16 else 2), 2 * number * BUCKET
    else:  # this rank's part is never freed; the step copies a group at a time
        standing, come = FP32 * part, "standing"
        gradients, messages = standing + FP32 * shares.largest_part, number * BUCKET
    return Memory(
        weights=run + stepped, gradients=gradients, optimizer_state=moments, gathered=gathered, messages=messages,
        standing=standing, messages_come=come,
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


def rank_memory(shares: Shares, model: ModelConfig, config: Config, objective: Objective, world: World, steps: int) -> Memory:
    """All that a rank holds, of a run of so many steps; of the world only its size and its kind of device matter. UserError where the
    global batch cannot be shared evenly."""
    passes, accumulation = Passes.of(config, world.device), config.batch.accumulation(world.size)
    length = config.data.sequence_length
    tokens = config.batch.micro_sequences * length
    memory = engine_memory(shares, config, passes.number, accumulation)
    memory.activations = round(tokens * activation_bytes(model, objective, passes, config.run.seed, steps))
    memory.activations += embedding_gradient_bytes(model, passes.stored) + mask_bytes(model, passes.number, tokens, length)
    memory.loss = loss_bytes(model, objective, passes, tokens)
    repeats = isinstance(objective, BackpropagationThroughTime) and objective.activation_checkpointing and config.engine.name == "torch"
    if repeats and most_trained_iterations(objective, config.run.seed, steps) > 1:
        kept = tokens * readout_bytes(model, objective, passes)
        memory.repeated = max(0, round(FP32 * (shares.core + shares.coda) - kept))
    if config.engine.cuda_graph:
        memory.gradients += passes.stored * shares.active
        memory.standing += passes.stored * shares.active
    memory.embedding_gradients = 2 * passes.stored * model.vocab_size * model.width
    engine = config.engine
    if engine.name == "deepspeed" and engine.zero_stage == 2 and passes.number == BF16 and not engine.offload_optimizer:
        # The core of an unrolled model has its gradient when all iterations have theirs, and activations are gone by then.
        left = float(shares.coda > BUCKET) if objective.repeats_core else max(0.0, 1 - BUCKET / shares.active)
        memory.at_first_message = round(left * memory.activations) + memory.gradients + memory.messages
    return memory


def checkpoint_bytes(shares: Shares, config: Config, number: int) -> int:
    """Bytes of a checkpoint: fp32 weights and moments for resuming, and the weights for export."""
    stored = BF16 if number == BF16 and config.engine.name == "deepspeed" and config.engine.zero_stage > 0 else FP32
    return (3 * FP32 + stored) * shares.whole
