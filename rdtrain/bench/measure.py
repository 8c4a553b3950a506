"""The measurement of one config: it is built as a run builds it, steps as a run steps (train.run_step), and is looked at from outside.

Weights stay as they were initialised (the learning rate is 0, which costs an optimizer as much as any other), so that steps on random
tokens can go nowhere, and every step meets the same numbers. Rates belong to the steps that were timed: where the depth is drawn, each
step's FLOPs are those of its own depth.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..data.loader import rank_indices, read_ahead
from ..data.mixture import open_loader
from ..distributed import World, agree, on_device, pinned
from ..engine import build_engine, start_processes
from ..estimate import Shares, model_on_paper, rank_memory, step_traffic
from ..faults import StepJudge
from ..hardware import peak_flops
from ..metrics import MetricSums
from ..model.attention import attention_backend
from ..model.recurrent import ModelConfig, RecurrentDepthLM
from ..objectives import Objective, ObjectiveSettings, build_objective
from ..objectives.bptt import BackpropagationThroughTime
from ..objectives.cuda_graph import captured_bytes
from ..preparation import objective_and_model
from ..randomness import SampleRandom
from ..train import run_step
from .arms import Case
from .memory import WatchedObjective, measure_memory
from .trace import Trace, trace_steps, write_memory_snapshot

ENQUEUED, TRACED = 3, 2
"""Steps that time the host alone, and steps under the profiler."""

POOL = 4
"""Micro-batches of random tokens, which take turns."""

HOST_BOUND = 0.9
"""A step whose kernels take less than this share of it waits for the host."""


@dataclass
class Effort:
    """What is run. warmup: steps before the clock starts; steps: timed ones. shards: read the config's shards, else random tokens.
    profile: a folder for traces, or None."""

    warmup: int = 5
    steps: int = 20
    shards: bool = False
    profile: Path | None = None


@dataclass
class Measurement:
    """What was found of one config; seconds, bytes and operations (FLOPs) a step, of all ranks where nothing else is said.

    out_of_memory: what torch said where memory ran out; then only what arithmetic knows is here.
    step_seconds: `median`, `p10`, `p90` and `mean` of the timed steps; `typical`, the median where they all do the same work and the mean
        where their depths differ: every rate is by it.
    enqueue_seconds: CUDA: of the host, to enqueue a step for an idle device. busy_seconds: CUDA: of the device, running kernels.
    message_seconds, exposed_seconds: CUDA: of NCCL's kernels, which wait for other ranks as well, and of those while no other kernel runs;
        means over the ranks.
    host_bound: whether the device has nothing to do for a tenth of a step or more; None where that is not known.
    compile_seconds: of torch.compile and the first forward and backward pass, with engine.compile.
    mfu, hfu: shares of the devices' peak without and with what the backward pass computes again; None where no peak is known.
    memory: `peak` and `reserved` by rank 0's allocator, and a split, see StepMemory; the peak is that of the rank that has most.
        `left_over` is what cases before this one have left allocated (a few MiB; ZeRO-3 leaves more); the peak is without it.
    estimate: the same by rdtrain/estimate.py, for rank 0: `passes` is its activations, gathered weights and what the loss takes, gradients
        apart; for `peak` see docs/performance.md.
    traffic: bytes that a rank sends, by kind of collective, by the same arithmetic.
    commit, started: of the command that measured it, which a later one may have kept; see `start_facts`.
    """

    arm: str
    value: str | None
    parameters: int
    model: dict
    objective: dict
    engine: dict
    ranks: int
    device: str
    precision: str
    attention: str
    micro_sequences: int
    accumulation: int
    sequence_length: int
    tokens_per_step: int
    estimate: dict[str, float]
    traffic: dict[str, float]
    commit: str | None = None
    started: str | None = None
    out_of_memory: str | None = None
    steps: int = 0
    step_seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    model_flops: float | None = None
    hardware_flops: float | None = None
    model_flops_per_second: float | None = None
    hardware_flops_per_second: float | None = None
    peak_flops_per_second: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    compile_seconds: float | None = None
    first_step_seconds: float | None = None
    enqueue_seconds: float | None = None
    busy_seconds: float | None = None
    message_seconds: float | None = None
    exposed_seconds: float | None = None
    host_bound: bool | None = None
    skipped_steps: int = 0
    memory: dict[str, int | None] = field(default_factory=dict)
    kernels: list[dict] = field(default_factory=list)
    attention_kernels: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def on_paper(case: Case, world: World, vocab_size: int, effort: Effort, bos_id: int = 0) -> Measurement:
    """What is known of a case before it runs. bos_id: of the shards; any token serves where they are random. UserError for settings that do
    not fit together."""
    config = case.config
    objective, model = objective_and_model(config, world, vocab_size, bos_id)
    accumulation, dtype = config.batch.accumulation(world.size), config.engine.dtype(world.device)
    shares = Shares.of(model_on_paper(model), config, objective, world.size)
    memory = rank_memory(shares, model, config, objective, world, effort.warmup + effort.steps)
    return Measurement(
        arm=case.arm, value=case.value, parameters=shares.whole, model=asdict(model), objective=asdict(config.objective),
        engine=asdict(config.engine), ranks=world.size, device=device_name(world.device), precision=str(dtype).removeprefix("torch."),
        attention=attention_backend(world.device, dtype, model.head_width, config.data.sequence_length, config.data.document_masking),
        micro_sequences=config.batch.micro_sequences, accumulation=accumulation,
        sequence_length=config.data.sequence_length, tokens_per_step=config.batch.global_sequences * config.data.sequence_length,
        estimate={
            "weights": memory.weights, "gradients": memory.gradients, "optimizer_state": memory.optimizer_state,
            "passes": memory.passes, "peak": memory.peak(accumulation),
        },
        traffic=asdict(step_traffic(shares, config, objective, dtype.itemsize, accumulation, world.size)),
    )


def device_name(device: torch.device) -> str:
    """CUDA's name of a device, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure(case: Case, known: Measurement, world: World, effort: Effort) -> Measurement:
    """`known`, of `on_paper`, and all that running the case shows. Collective.

    RuntimeError and MemoryError where memory runs out; what was allocated goes with the error.
    """
    config, device, cuda = case.config, world.device, world.device.type == "cuda"
    model_config = ModelConfig(**known.model)
    objective, _ = objective_and_model(config, world, model_config.vocab_size, model_config.document_mark or 0)
    start_processes(config.engine, world)
    left_over = torch.cuda.memory_allocated(device) if cuda else 0
    torch.manual_seed(config.run.seed)
    with device:  # at once where it belongs: the CPU would need minutes for the numbers of a large one
        model = RecurrentDepthLM(model_config)
    watched = WatchedObjective(objective)
    engine = build_engine(config.engine, model, watched, config.optimizer, known.micro_sequences, known.accumulation, world)
    result = replace(known)
    judge, sums, seed = StepJudge(config.faults, config.model.blocks, world), MetricSums(), config.run.seed
    timed = range(effort.warmup, effort.warmup + effort.steps)
    batches, step = _batches(config, model_config, world, effort.shards, timed.stop + ENQUEUED + 2 * TRACED + 3), 0

    def advance() -> None:
        """One step, as the training loop makes it, which lets the host be one step ahead of the device."""
        nonlocal step
        of_step = SampleRandom(seed, (), device, step)
        answer = agree(world, f"step {step + 1}", step, 0)
        run_step(engine, objective, next(batches), 0.0, of_step, seed, step, world, judge, sums)
        answer()
        judge.read(last_too=False)
        step += 1

    with closing(batches):
        if config.engine.compile:
            share = rank_indices(0, config.batch.global_sequences, 1, 0, known.micro_sequences)[0]
            tokens = torch.zeros(known.micro_sequences, known.sequence_length + 1, dtype=torch.int64)
            first = on_device(tokens, device), SampleRandom(seed, share, device)
            result.compile_seconds = seconds_of(lambda: engine.warm_up(*first), device)
            if cuda:  # what the compiler tried its kernels on
                torch.cuda.empty_cache()
        result.first_step_seconds = seconds_of(advance, device)
        while step < timed.start:
            advance()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        durations = _durations(advance, effort.steps, device)
        memory = {"reserved": torch.cuda.max_memory_reserved(device) if cuda else None}
        peak = torch.cuda.max_memory_allocated(device) + captured_bytes(device) if cuda else 0
        if cuda:
            result.enqueue_seconds = statistics.median(_enqueue(advance, device) for _ in range(ENQUEUED))
        split = measure_memory(advance, watched, engine.model, device)
        memory |= asdict(split) | {"peak": int(world.maximum(max(peak, split.peak) - left_over)), "left_over": left_over}
        trace = _trace(advance, case, effort, world, result.files)
        judge.read(last_too=True)
        if world.size > 1:
            result.message_seconds, result.exposed_seconds = _means(world, trace.message_seconds, trace.exposed_seconds)
    engine.close()

    result.memory, result.skipped_steps, result.steps = memory, judge.total, effort.steps
    result.busy_seconds, result.attention_kernels = trace.busy_seconds, trace.attention
    result.kernels = [asdict(kernel) for kernel in trace.kernels] if effort.profile else []
    flops = [step_flops(config, objective, model_config, number) for number in timed]
    _fill_in_rates(result, durations, flops, world)
    return result


def step_flops(config: Config, objective: Objective, model: ModelConfig, step: int) -> tuple[float, float]:
    """Operations of a step, of all ranks: the model's, and those that the backward pass makes once more; at the depth that it draws."""
    if isinstance(objective, BackpropagationThroughTime):
        depth = objective.shared_draw(SampleRandom(config.run.seed, (), torch.device("cpu"), step))
        settings = config.objective
        if settings.gradient == "truncated" and settings.trained_iterations >= depth:
            settings = replace(settings, gradient="full", trained_iterations=ObjectiveSettings().trained_iterations)
        objective = build_objective(replace(settings, depth="fixed"), config.noise, depth)
    length = config.data.sequence_length
    tokens = config.batch.global_sequences * length
    return tokens * objective.training_flops(model, length), tokens * objective.recomputed_flops(model, length)


def _fill_in_rates(result: Measurement, durations: list[float], flops: list[tuple[float, float]], world: World) -> None:
    quantiles = statistics.quantiles(durations, n=10, method="inclusive") if len(durations) > 1 else durations * 9
    median, mean = statistics.median(durations), statistics.mean(durations)
    typical = median if len(set(flops)) == 1 else mean
    result.step_seconds = {"median": median, "p10": quantiles[0], "p90": quantiles[8], "mean": mean, "typical": typical}
    result.tokens_per_second = result.tokens_per_step / typical
    result.model_flops = statistics.mean(model for model, _ in flops)
    result.hardware_flops = result.model_flops + statistics.mean(again for _, again in flops)
    result.model_flops_per_second, result.hardware_flops_per_second = result.model_flops / typical, result.hardware_flops / typical
    peak = peak_flops(result.device) if result.precision == "bfloat16" else None
    if peak is not None:
        result.peak_flops_per_second = peak * world.size
        result.mfu = result.model_flops_per_second / result.peak_flops_per_second
        result.hfu = result.hardware_flops_per_second / result.peak_flops_per_second
    if result.busy_seconds is not None:
        result.host_bound = result.busy_seconds < HOST_BOUND * typical


def _batches(config: Config, model: ModelConfig, world: World, shards: bool, steps: int):
    """An iterator of this rank's micro-batches of each step, (samples, tokens on the CPU), which can be closed."""
    batch, groups = config.batch, config.engine.groups(config.model.blocks)

    def shares(step: int) -> list[range]:
        return rank_indices(step, batch.global_sequences, world.size, world.rank, batch.micro_sequences, groups)

    if shards:
        loader = open_loader(config.data.train, config.data.mixture, config.data.rows, config.data.sequence_length, config.run.seed)
        return read_ahead(lambda step: [(share, pinned(loader.batch(share), world.device)) for share in shares(step)], 0, steps)
    generator = torch.Generator().manual_seed(world.rank)
    shape = (batch.micro_sequences, config.data.sequence_length + 1)
    pool: list[Tensor] = [torch.randint(model.vocab_size, shape, generator=generator) for _ in range(POOL)]
    return ([(share, pool[(step + number) % POOL]) for number, share in enumerate(shares(step))] for step in range(steps))


def _means(world: World, *values: float | None) -> list[float | None]:
    """Over the ranks; None for what one of them does not know. Collective."""
    return [None if None in column else statistics.mean(column) for column in zip(*world.gather(values))]


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until an idle device has done some work, and the host as well."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def _enqueue(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until the host is done with work for a device that was idle."""
    synchronize(device)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _durations(work: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Seconds from the end of one piece of work to the end of the next, on the device, which is not made to wait in between."""
    if device.type != "cuda":
        return [seconds_of(work, device) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    ends[0].record()
    for end in ends[1:]:
        work()
        end.record()
    synchronize(device)
    return [1e-3 * before.elapsed_time(after) for before, after in zip(ends, ends[1:])]


def _trace(advance: Callable[[], None], case: Case, effort: Effort, world: World, files: list[str]) -> Trace:
    """What the profiler sees: on CUDA always, on the CPU where a profile is asked for. The names of files are added to `files`."""
    cuda = world.device.type == "cuda"
    if effort.profile is None:
        return trace_steps(advance, TRACED, world.device, host=False) if cuda else Trace()
    name = "-".join(filter(None, (case.arm, case.value, f"rank-{world.rank}" * (world.size > 1))))
    path = effort.profile / ("".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) + ".json.gz")
    trace = trace_steps(advance, TRACED, world.device, host=True, path=path)
    files.append(str(path))
    if cuda:
        snapshot = path.with_name(path.name.replace(".json.gz", "-memory.pickle"))
        write_memory_snapshot(advance, snapshot)
        files.append(str(snapshot))
    return trace
