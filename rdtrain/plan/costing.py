"""One config on so many GPUs of a kind, costed by arithmetic: memory, traffic, time and price, and what to change where it does not fit.

Memory, traffic and operations are those of `rdtrain/estimate.py` and the objectives, which dry runs and `rdtrain bench` quote as well.
What a GPU reaches of its speed on paper is the user's to say. Notable: traffic is taken to hide behind computation, as engines overlap
both, until it takes longer; then it is what bounds a step.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..config import Config, override
from ..distributed import World
from ..errors import UserError
from ..estimate import Memory, Shares, model_on_paper, parameters_by_part, rank_memory, step_traffic
from ..hardware import Gpu
from ..preparation import objective_and_model

CUDA = torch.device("cuda")
MOST_GPUS = 1 << 20  # where the search for a number that is enough ends
RECURRENT_CHECKPOINTING = "objective.activation_checkpointing=true"
SHARDING = tuple(f"engine.name=deepspeed engine.zero_stage={stage}" for stage in (1, 2, 3))
OFFLOAD = "engine.name=deepspeed engine.zero_stage=3 engine.offload_optimizer=true"


@dataclass
class Cluster:
    """What a plan is made for.

    gpu: its kind; count: how many. reserve: GiB of each that PyTorch's tensors cannot have: the CUDA context, NCCL, and gaps between
    allocations. mfu: the share of the speed on paper that is reached, counting what checkpointing computes again as work (HFU).
    network: GB/s that a GPU sends to other nodes.
    """

    gpu: Gpu
    count: int
    reserve: float
    mfu: float
    network: float

    @property
    def room(self) -> float:
        """Bytes of a GPU for tensors."""
        return 2**30 * (self.gpu.memory - self.reserve)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a GPU sends while all take part in a ring, which is as fast as its slowest link."""
        return 1e9 * (self.gpu.link if self.count <= self.gpu.per_node else min(self.gpu.link, self.network))


@dataclass
class Cost:
    """An arm of a plan on so many GPUs; bytes, seconds and operations (FLOPs).

    micro_sequences, accumulation, global_sequences: the batch that was costed; grown: whether the config's own was too small or did not
    divide. refused: why it cannot run at all, in one sentence; all after it is None then.
    memory: of a rank, by kind; peak: the most at any moment. fits: whether that is in the GPU's room. largest_micro: the most sequences
    that fit, of those that divide the batch; 0 for none. change: the overrides of the nearest config that fits, None where this one does
    or none was found.
    sent: by a rank in a step; step_seconds: of a step; sending_seconds: what the step's messages need; training_seconds: of all steps.
    """

    arm: str
    gpus: int
    micro_sequences: int
    accumulation: int
    global_sequences: int
    grown: bool
    refused: str | None = None
    parameters: dict[str, int] | None = None
    flops_per_token: float | None = None
    recomputed_per_token: float | None = None
    memory: Memory | None = None
    peak: int | None = None
    fits: bool | None = None
    largest_micro: int | None = None
    change: list[str] | None = None
    sent: float | None = None
    step_seconds: float | None = None
    sending_seconds: float | None = None
    training_seconds: float | None = None
    training_flops: float | None = None


@dataclass
class _Paper:
    """What follows from a config and a number of ranks: its pieces, that need no micro-batch. tokens: how many are trained on; None for as
    many as the schedule says. filled: as of cost."""

    config: Config
    world: World
    tokens: float | None
    vocab_size: int
    filled: float

    def __post_init__(self):
        self.objective, self.model = objective_and_model(self.config, self.world, self.vocab_size, bos_id=0)
        on_paper = model_on_paper(self.model)
        self.parameters = parameters_by_part(on_paper)
        self.shares = Shares.of(on_paper, self.config, self.objective, self.world.size)
        length, schedule = self.config.data.sequence_length, self.config.schedule
        self.flops_per_token = self.objective.training_flops(self.model, length) / self.filled
        self.tokens_per_step = self.config.batch.global_sequences * length * self.filled
        steps = schedule.steps or schedule.training_flops / self.flops_per_token / self.tokens_per_step
        self.steps = max(1, int(steps if self.tokens is None else self.tokens / self.tokens_per_step))

    def memory(self, micro: int) -> tuple[Memory, int]:
        """Of a rank with micro-batches of so many sequences, and its peak."""
        config = with_batch(self.config, self.config.batch.global_sequences, micro)
        memory = rank_memory(self.shares, self.model, config, self.objective, self.world, self.steps)
        return memory, memory.peak(config.batch.accumulation(self.world.size))

    def largest_micro(self, room: float) -> int:
        """The most sequences of a micro-batch that fit, of those that divide a rank's share of the batch; 0 for none."""
        share = self.config.batch.global_sequences // self.world.size
        divisors = (count for count in range(share, 0, -1) if share % count == 0)
        return next((micro for micro in divisors if self.memory(micro)[1] <= room), 0)


def with_batch(config: Config, global_sequences: int, micro_sequences: int) -> Config:
    """The config with another batch."""
    return replace(config, batch=replace(config.batch, global_sequences=global_sequences, micro_sequences=micro_sequences))


def batch_for(config: Config, gpus: int) -> tuple[Config, bool]:
    """The config with a batch that so many ranks can share: its own, or where they cannot share that, the next larger one that they can;
    and whether it was that. The micro-batch is the largest one up to the config's own that divides a rank's share."""
    batch = config.batch
    share = -(-batch.global_sequences // gpus)
    micro = max(count for count in range(1, min(share, batch.micro_sequences) + 1) if share % count == 0)
    return with_batch(config, share * gpus, micro), bool(batch.global_sequences % gpus)


def cost(arm: str, config: Config, vocab_size: int, cluster: Cluster, tokens: float | None, filled: float = 1.0) -> Cost:
    """What a config costs on a cluster. tokens: how many are trained on; None for as many as the config's schedule says. filled: the share
    of a sequence's positions that train, which is less where rows are documents."""
    config, grown = batch_for(config, cluster.count)
    batch, world = config.batch, World(0, cluster.count, 0, CUDA)
    found = Cost(arm, cluster.count, batch.micro_sequences, batch.accumulation(cluster.count), batch.global_sequences, grown)
    try:
        paper = _Paper(config, world, tokens, vocab_size, filled)
    except UserError as error:
        found.refused = str(error)
        return found
    objective, length = paper.objective, config.data.sequence_length
    found.parameters = paper.parameters
    found.flops_per_token = paper.flops_per_token
    found.recomputed_per_token = objective.recomputed_flops(paper.model, length) / filled
    found.memory, found.peak = paper.memory(batch.micro_sequences)
    found.fits = found.peak <= cluster.room
    found.largest_micro = paper.largest_micro(cluster.room)
    if not found.fits:
        found.change = nearest_change(paper, cluster, found.largest_micro)
    number = config.engine.dtype(CUDA).itemsize
    found.sent = step_traffic(paper.shares, config, objective, number, found.accumulation, cluster.count).bytes
    tokens_per_step = paper.tokens_per_step
    computing = tokens_per_step * (found.flops_per_token + found.recomputed_per_token) / (
        cluster.count * 1e12 * cluster.gpu.tflops * cluster.mfu
    )
    found.sending_seconds = found.sent / cluster.bandwidth
    found.step_seconds = max(computing, found.sending_seconds)
    if tokens is None:
        schedule = config.schedule
        tokens = tokens_per_step * schedule.steps if schedule.steps else schedule.training_flops / found.flops_per_token
    found.training_seconds = tokens / tokens_per_step * found.step_seconds
    found.training_flops = tokens * found.flops_per_token
    return found


def nearest_change(paper: _Paper, cluster: Cluster, largest_micro: int) -> list[str] | None:
    """Overrides that make a config fit, the least of those that are known: a smaller micro-batch; else checkpointing, then sharding, then
    both, then offloading as well, each with the largest micro-batch that fits with it; else more GPUs. None where nothing is enough."""
    if largest_micro:
        return [f"batch.micro_sequences={largest_micro}"]
    config = paper.config
    for changes in _changes(config, cluster.count):
        micro = _largest_with(paper, config, changes, cluster)
        if micro:
            return [*changes, *([f"batch.micro_sequences={micro}"] if micro < config.batch.micro_sequences else [])]
    count = 2 * cluster.count
    everything = [*([RECURRENT_CHECKPOINTING] if config.objective.name == "bptt" else []), _checkpointing(config)[-1], OFFLOAD]
    while count <= MOST_GPUS:
        more, _ = batch_for(config, count)
        if micro := _largest_with(paper, more, everything, replace(cluster, count=count)):
            sequences = f"batch.global_sequences={more.batch.global_sequences}"
            return [f"{count} GPUs", *everything, *([sequences] if more.batch.global_sequences != config.batch.global_sequences else []),
                    f"batch.micro_sequences={micro}"]
        count *= 2
    return None


def _checkpointing(config: Config) -> list[str]:
    """What layers can keep, that which costs least time first: but for inputs all products, nothing of every fourth or second, nothing."""
    interval = "objective.layer_checkpointing_interval"
    all_layers = f" {interval}=1" if config.objective.layer_checkpointing_interval > 1 else ""
    full = "objective.layer_checkpointing=full"
    return [f"objective.layer_checkpointing=selective{all_layers}", f"{full} {interval}=4", f"{full} {interval}=2", full + all_layers]


def _changes(config: Config, gpus: int) -> Iterator[list[str]]:
    """Sets of overrides, the mildest first."""
    checkpointing = _checkpointing(config)
    keeping = [[], *([each] for each in checkpointing)]
    if config.objective.name == "bptt":
        keeping[1:1] = [[RECURRENT_CHECKPOINTING]]
        keeping.append([RECURRENT_CHECKPOINTING, checkpointing[-1]])
    if config.engine.name == "block_parallel":
        sharding = [[]]
    else:
        current = config.engine.zero_stage if config.engine.name == "deepspeed" else 3 if config.engine.name == "fsdp" else 0
        sharding = [[], *([each] for stage, each in enumerate(SHARDING, 1) if stage > current and gpus > 1), [OFFLOAD]]
    for shard, keep in itertools.product(sharding, keeping):
        if shard or keep:
            yield [*keep, *shard]


def _largest_with(paper: _Paper, config: Config, changes: list[str], cluster: Cluster) -> int:
    """The largest micro-batch that fits with these overrides, at most the config's own; 0 for none, or where they cannot be."""
    try:
        changed = override(config, [word for change in changes for word in change.split()])
        paper = replace(paper, config=changed, world=World(0, cluster.count, 0, CUDA))
    except UserError:
        return 0
    return min(paper.largest_micro(cluster.room), config.batch.micro_sequences)
