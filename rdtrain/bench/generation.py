"""What generation costs, on the device that is there: tokens a second, time to the first token, and memory.

    python -m rdtrain.bench.generation --output runs/generation --budget 460

Denoising blocks, with and without CUDA graphs and adaptive iterations, beside an unrolled model of the same shape (BPTT's) and a plain
transformer that makes as many operations a token, at each K and batch; and beside the time that the weights need to be read once an
iteration, at the memory bandwidth that is measured first. Weights of a config are random, which costs as much as trained ones; only
where adaptive iterations end depends on them, so for these give an exported folder.

Notable: generation.json is written after every case, in the order that the command line gives, the most wanted first. `--resume` keeps
what is there, `--budget` begins no further case once it is spent. generation.md beside it has the tables.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..data.output import write_atomically
from ..distributed import World
from ..errors import UserError, first_line, out_of_memory, user_errors_as_exit
from ..estimate import model_on_paper
from ..flops import generation_flops
from ..model.chain import check_sampling
from ..model.decoding import Decoder, cache_bytes
from ..model.noise import NoiseSchedule
from ..model.recurrent import MOST_ITERATIONS, ModelConfig, RecurrentDepthLM
from ..run_folder import start_facts
from .generation_arms import KINDS, Arm, Subject, build, compile_layers, shape_of
from .generation_report import page
from .measure import device_name, seconds_of, synchronize
from .trace import trace_steps

ARMS = ["blocks compile=true", "blocks", "bptt compile=true", "plain compile=true", "blocks exit=entropy compile=true", "bptt", "plain",
        "blocks graph=false"]
MODELS = ["configs/1b.yaml:32768", "configs/70m.yaml:8192"]
FULL = 0.95  # of the device's memory: a case whose weights and cache need more is not begun


@dataclass
class Effort:
    """How long is measured. prompt, new: tokens of each text; seconds: of decoding, about, in each of so many repeats."""

    prompt: int = 64
    new: int = 64
    seconds: float = 0.4
    repeats: int = 3


@dataclass
class Row:
    """What was found of one case.

    iterations: K, of a plain transformer that of the blocks which make as many operations. layers: those that a token passes. flops: of
    one token in the middle of the new ones. weight_bytes: of all weights; read_bytes: of those that a token's iterations run, each time
    anew. cache_bytes: of all texts. out_of_memory: why it did not run. prepare_seconds: of the first two tokens, with captures.
    first_token_seconds: from a prompt's tokens to the first new one, median; token_seconds: of each further one, of all texts at once,
    median over the repeats. iterations_used: where there is an exit, how many tokens took so many. peak_bytes: CUDA: the most that was
    allocated. busy_seconds, launches, kernels: CUDA, of the first case of each arm: for how long a token keeps the device busy, with how
    many kernels and copies, and the costliest of them.
    """

    model: str
    arm: str
    iterations: int
    batch: int
    layers: int
    parameters: int
    precision: str
    flops: float
    weight_bytes: int
    read_bytes: int
    cache_bytes: int
    graph: bool
    out_of_memory: str | None = None
    prepare_seconds: float | None = None
    first_token_seconds: float | None = None
    token_seconds: float | None = None
    tokens: int = 0
    iterations_used: dict[int, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    busy_seconds: float | None = None
    launches: float | None = None
    kernels: list[dict] = field(default_factory=list)


def memory_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that the device's memory moves, the best of ten sums and ten copies of so many bytes."""
    size = size or (2**32 if device.type == "cuda" else 2**27)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for moved, work in ((size, source.sum), (2 * size, lambda: target.copy_(source))):
        work()
        best = max(best, *(moved / seconds_of(work, device) for _ in range(10)))
    return best


def read_bytes(model: RecurrentDepthLM, iterations: int, itemsize: int) -> int:
    """Bytes of weights that one token needs where nothing stays on the chip from one iteration to the next.

    A denoising model runs one block's core, coda and head at every iteration, but for what a noise level needs, which is known before;
    another the core alone.
    """
    parts = Counter()
    for name, parameter in model.named_parameters():
        if ".modulation." not in name and not name.startswith("noise_embedding."):
            parts[name.partition(".")[0]] += parameter.numel()
    once, core = parts.pop("prelude_layers"), parts.pop("cores") // model.config.blocks
    rest = parts.total()
    if model.config.noise_conditioning:
        return itemsize * (once + iterations * (core + rest))
    return itemsize * (once + iterations * core + rest)


def row_of(subject: Subject, arm: Arm, iterations: int, batch: int, shape: ModelConfig, model: RecurrentDepthLM, effort: Effort,
           device: torch.device) -> Row:
    """What is known of a case before it runs. model: on paper or not."""
    own = 1 if arm.kind == "plain" else iterations
    parameters, itemsize = sum(one.numel() for one in model.parameters()), subject.dtype.itemsize
    repeated = shape.core_layers + (shape.coda_layers if shape.noise_conditioning else 0)
    layers = shape.prelude_layers + own * repeated + (0 if shape.noise_conditioning else shape.coda_layers)
    cache = batch * cache_bytes(model, own, arm.sampling, effort.prompt + effort.new)
    return Row(
        model=subject.name, arm=arm.name, iterations=iterations, batch=batch, layers=layers, parameters=parameters,
        precision=str(subject.dtype).removeprefix("torch."), flops=generation_flops(shape, own, effort.prompt + effort.new // 2),
        weight_bytes=itemsize * parameters, read_bytes=read_bytes(model, own, itemsize), cache_bytes=cache,
        graph=arm.graph and device.type == "cuda" and arm.sampling.exit == "never",
    )


def measure(row: Row, arm: Arm, model: RecurrentDepthLM, noise: NoiseSchedule, effort: Effort, look_inside: bool) -> None:
    """Run a case and fill in its row. look_inside: trace a token, on CUDA. RuntimeError where memory runs out."""
    device = model.embedding.weight.device
    cuda = device.type == "cuda"
    own = 1 if arm.kind == "plain" else row.iterations
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    capacity, capture = effort.prompt + effort.new, None if arm.graph else False
    decoder = Decoder(model, noise, own, arm.sampling, row.batch, capacity, capture=capture, compiled=arm.compile and arm.kind != "plain")
    ids = torch.randint(model.config.vocab_size, (row.batch, effort.prompt), generator=torch.Generator().manual_seed(0))

    def run(further: int) -> tuple[float, float]:
        """Seconds to the first token, and of so many further ones."""
        decoder.truncate(0)
        steps = decoder.generate(ids, 0, 1 + further)
        first = seconds_of(lambda: next(steps), device)
        return first, seconds_of(lambda: list(steps), device)

    row.prepare_seconds = sum(run(1))
    longest = effort.new - 1
    further = max(2, min(longest, round(effort.seconds / (run(2)[1] / 2)))) if longest > 2 else longest
    found, used = [], Counter()
    for _ in range(effort.repeats):
        found.append(run(further))
        used.update(one for step in decoder.iterations_used[1:] for one in step.tolist())  # the prompt's pass has no exit
    row.first_token_seconds = statistics.median(first for first, _ in found)
    row.token_seconds, row.tokens = statistics.median(rest for _, rest in found) / further, further
    row.iterations_used = dict(sorted(used.items()))
    if cuda:
        row.peak_bytes = torch.cuda.max_memory_allocated(device)
    if cuda and look_inside:
        decoder.truncate(0)
        steps = decoder.generate(ids, 0, 4)
        next(steps), next(steps)
        trace = trace_steps(lambda: next(steps), 2, device, host=False)
        row.busy_seconds, row.launches, row.kernels = trace.busy_seconds, trace.launches, [asdict(one) for one in trace.kernels]


def measure_or_run_out(row: Row, work: Callable[[], None], device: torch.device) -> None:
    """With nothing in memory of the cases before it; where that runs out, the row says so."""
    gc.collect()  # layers that are compiled by themselves hold themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        there = torch.cuda.get_device_properties(device).total_memory
        if row.weight_bytes + row.cache_bytes > FULL * there:
            row.out_of_memory = f"weights and cache need {(row.weight_bytes + row.cache_bytes) / 2**30:.0f} GiB of {there / 2**30:.0f}"
            return
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        reasons, one = [], error
        while one is not None:  # a capture that memory ran out in ends with an error of its own
            reasons, one = [*reasons, one], one.__context__
        ran_out = [one for one in reasons if out_of_memory(one)]
        if not ran_out:
            raise
        row.out_of_memory = first_line(ran_out[0])


@dataclass
class Settings:
    """What is measured: see the command line."""

    models: list[str]
    arms: list[str]
    iterations: list[int]
    batches: list[int]
    effort: Effort
    output: Path
    resume: bool = False
    budget: float | None = None

    def __post_init__(self):
        """UserError for what cannot be run."""
        numbers = {"--iterations": self.iterations, "--batches": self.batches, "--prompt-tokens": [self.effort.prompt],
                   "--repeats": [self.effort.repeats]}
        for name, values in numbers.items():
            if min(values) < 1:
                raise UserError(f"{name} must be at least 1, and it is {min(values)}: give larger numbers")
        if max(self.iterations) > MOST_ITERATIONS:
            raise UserError(f"--iterations must be at most {MOST_ITERATIONS}, and it is {max(self.iterations)}: give smaller numbers")
        if not 0 < self.effort.seconds < math.inf:
            raise UserError(f"--seconds must be positive and finite, and it is {self.effort.seconds}: leave it out for {Effort.seconds}")
        if self.effort.new < 2:
            raise UserError(f"--new-tokens must be at least 2, and it is {self.effort.new}: the first is timed by itself")


@torch.inference_mode()
def measure_generation(settings: Settings, device: torch.device) -> dict:
    """All cases, one after another; returns what generation.json has. UserError for anything that a user can mend."""
    started, effort = time.monotonic(), settings.effort
    torch._dynamo.config.recompile_limit = 64  # arms and batches share compiled functions, and would run uncompiled beyond torch's 8 kinds
    arms, subjects = [Arm.parse(text) for text in settings.arms], [Subject.load(text, device) for text in settings.models]
    for subject, arm in itertools.product(subjects, arms):
        if arm.kind == "blocks":
            try:
                check_sampling(subject.shape, arm.sampling)
            except ValueError as error:
                raise UserError(f"arm '{arm.name}' cannot be of {subject.name}: {error}") from None
    report = {"facts": start_facts(device.type), "device": device_name(device), "effort": asdict(effort), "complete": False}
    kept = _kept(settings.output, report) if settings.resume else {}
    report |= {"bandwidth": kept.get("bandwidth") or memory_bandwidth(device), "measurements": kept.get("measurements", [])}
    known = {_key(row) for row in report["measurements"]}
    seen = {(row["model"], row["arm"]) for row in report["measurements"]}
    planned = [(k, subject, arm) for k in settings.iterations for subject in subjects for arm in arms]
    for k, subject, arm in planned:
        shape, model = shape_of(arm.kind, subject.shape, k, effort.prompt + effort.new // 2), None
        paper = model_on_paper(shape).to(subject.dtype)
        for batch in settings.batches:
            row = row_of(subject, arm, k, batch, shape, paper, effort, device)
            if _key(asdict(row)) in known:
                continue
            if settings.budget is not None and time.monotonic() - started > settings.budget:
                return report

            def work(row=row, arm=arm, subject=subject, shape=shape) -> None:
                nonlocal model
                if model is None:
                    model = subject.model if arm.kind == "blocks" and subject.model else build(shape, subject.dtype, device)
                    if arm.compile and arm.kind == "plain":
                        compile_layers(model)
                measure(row, arm, model, subject.noise, effort, (subject.name, arm.name) not in seen)

            measure_or_run_out(row, work, device)
            seen.add((subject.name, arm.name))
            report["measurements"].append(asdict(row))
            report["complete"] = len(report["measurements"]) >= len(planned) * len(settings.batches)
            _write(settings.output, report)
    synchronize(device)
    return report


def _key(row: dict) -> tuple:
    return row["model"], row["arm"], row["iterations"], row["batch"]


def _write(output: Path, report: dict) -> None:
    write_atomically(output / "generation.json", json.dumps(report, indent=1) + "\n")
    write_atomically(output / "generation.md", page(report))


def _kept(output: Path, report: dict) -> dict:
    path = output / "generation.json"
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        same = before["device"] == report["device"] and before["effort"] == report["effort"]
        same = same and before["facts"]["versions"] == report["facts"]["versions"] and before["bandwidth"] > 0
        [Row(**row) for row in before["measurements"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what this version writes: remove it, or choose another --output") from None
    if not same:
        raise UserError(f"{path} was made on another device or with other options: choose another --output, or leave out --resume")
    return before


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rdtrain.bench.generation", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("models", nargs="*", default=MODELS, help="exported folders, or CONFIG:TOKENS, with random weights")
    parser.add_argument("--output", type=Path, required=True, help="folder for generation.json and generation.md")
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="ARM", help=f"one of {', '.join(KINDS)}, and settings of generation")
    parser.add_argument("--iterations", type=int, nargs="+", default=[32, 1, 8, 64, 4], metavar="K", help="in the order of measurement")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 16], metavar="N", help="texts at a time")
    parser.add_argument("--prompt-tokens", type=int, default=Effort.prompt, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=Effort.new, help="tokens that there is room for behind it")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="of decoding in each repeat, about")
    parser.add_argument("--repeats", type=int, default=Effort.repeats, help="of each case; the median counts")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that the output folder has")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further case once they are over")
    given = parser.parse_args()
    effort = Effort(given.prompt_tokens, given.new_tokens, given.seconds, given.repeats)
    with user_errors_as_exit():
        settings = Settings(given.models, given.arms, given.iterations, given.batches, effort, given.output, given.resume, given.budget)
        try:
            given.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {given.output} cannot be made ({error.strerror}): choose another --output") from None
        report = measure_generation(settings, World.from_environment().device)
        print(page(report) if report["measurements"] else "nothing was measured within the budget")


if __name__ == "__main__":
    main()
