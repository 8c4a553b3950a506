"""The command `rdtrain bench`: every case of a comparison or a sweep, one after another in this process, and what was found.

With an output folder each measurement is written down as soon as it is made, so that an end that was not planned loses one at most, and
`resume` goes on from there. A case that runs out of memory is a row that says so.
"""

import gc
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..config import Config
from ..data.mixture import open_loader
from ..data.output import report_folder, write_atomically
from ..data.shards import ShardReader
from ..distributed import World, leave
from ..errors import UserError, first_line, out_of_memory
from ..run_folder import start_facts
from .arms import Case, cases
from .measure import Effort, Measurement, measure, on_paper
from .report import plot_sweep, point_of, tables


@dataclass
class BenchSettings:
    """What is measured, of which config. compare, sweep: see `cases`. vocab_size: of random tokens; None for that of the config's shards.
    output: a folder for bench.json and, of a sweep, sweep.png; resume: keep the measurements that it has. budget: seconds after which no
    further measurement is begun."""

    effort: Effort = field(default_factory=Effort)
    compare: list[str] = field(default_factory=list)
    sweep: list[str] = field(default_factory=list)
    vocab_size: int | None = None
    output: Path | None = None
    resume: bool = False
    budget: float | None = None

    def __post_init__(self):
        """UserError for what cannot be run."""
        for name in ("steps", "warmup"):
            if getattr(self.effort, name) < 1:
                raise UserError(f"--{name} must be at least 1, and it is {getattr(self.effort, name)}: give a number of steps")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"--vocab-size must be at least 1, and it is {self.vocab_size}: give the tokenizer's number of tokens")
        if self.vocab_size is not None and self.effort.shards:
            raise UserError("--vocab-size is of random tokens, and --tokens is shards, which have their own: leave one of them out")
        if self.resume and self.output is None:
            raise UserError("--resume goes on with what an --output folder has, and there is none: give --output FOLDER")
        if self.budget is not None and self.output is None:
            raise UserError("--budget leaves measurements to a later --resume, for which they must be kept: give --output FOLDER")


def bench(config: Config, settings: BenchSettings) -> str | None:
    """Measure; returns the tables, on rank 0 alone. Every rank calls this. UserError for anything that a user can mend."""
    world, effort, started = World.from_environment(), settings.effort, time.monotonic()
    planned, known = cases(config, settings.compare, settings.sweep), []
    for case in planned:  # so that what is wrong is found before the first runs
        reader = _reader(case.config, settings)
        vocab_size, bos_id = (reader.vocab_size, reader.manifest["bos_id"]) if reader else (settings.vocab_size, 0)
        known.append(on_paper(case, world, vocab_size, effort, bos_id))
    swept = settings.sweep[0].partition("=")[0] if settings.sweep else None
    options = {"warmup": effort.warmup, "steps": effort.steps, "shards": effort.shards, "swept": swept}
    settled = {name: asdict(getattr(config, name)) for name in ("data", "noise", "optimizer")}  # what no row has of its own
    del settled["data"]["sequence_length"]
    facts = start_facts(world.device.type)
    known = [replace(row, commit=facts["commit"], started=facts["started"]) for row in known]
    report = {"facts": facts, **options, "settings": json.loads(json.dumps(settled))}
    for folder, held, option in ((settings.output, "measurements", "--output"), (effort.profile, "traces", "--profile")):
        if folder is not None:
            report_folder(folder, held, option)
    kept, rows, made = _kept(settings, report) if settings.resume else [], [], 0
    for case, row in zip(planned, known, strict=True):
        before = [other for other in kept if _same(other, row)]
        if not before and made and settings.budget is not None and world.maximum(time.monotonic() - started) > settings.budget:
            continue
        rows.append(before[0] if before else _measure_or_run_out(case, row, world, effort))
        made += not before
        if settings.output is not None and world.is_main:
            others = [other for other in kept if other not in rows]  # whose turn comes later, or which are of another comparison
            done = {"complete": len(rows) == len(planned), "measurements": [asdict(row) for row in [*rows, *others]]}
            write_atomically(settings.output / "bench.json", json.dumps(report | done, indent=1) + "\n")
    leave()
    if not world.is_main:
        return None
    if swept is not None and settings.output is not None:
        plot_sweep([point_of(row) for row in rows], swept, settings.output / "sweep.png")
    missing = len(planned) - len(rows)
    left = f"\n{missing} measurements were left, as {settings.budget:g} s are over: --resume makes them." if missing else ""
    return tables(rows, swept) + left


def _reader(config: Config, settings: BenchSettings) -> ShardReader | None:
    if settings.vocab_size is not None:
        return None
    try:
        data = config.data
        return open_loader(data.train, data.mixture, data.rows, data.sequence_length, config.run.seed).reader
    except UserError as error:
        if settings.effort.shards:
            raise
        raise UserError(f"the number of tokens in the vocabulary is not known, as {error}; or give --vocab-size") from None


def _measure_or_run_out(case: Case, known: Measurement, world: World, effort: Effort) -> Measurement:
    """A measurement, with nothing left of it in memory; where memory runs out, what is known without one."""
    try:
        found = measure(case, known, world, effort)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or world.size > 1:  # the other ranks wait in a collective call
            raise
        found = replace(known, out_of_memory=first_line(error))
    # The error is gone by now, and with its frames what they held.
    torch._dynamo.reset()  # compiled code is kept for each function, and the next case would count as its recompilation
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _kept(settings: BenchSettings, report: dict) -> list[Measurement]:
    """The measurements that the output folder has. UserError where they were made otherwise than these would be."""
    path = settings.output / "bench.json"
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        facts = before["facts"]
        rows = [Measurement(**{name: facts[name] for name in ("commit", "started")} | row) for row in before["measurements"]]
        same = all(facts[name] == report["facts"][name] for name in ("machine", "versions"))
        same = same and all(before[name] == report[name] for name in report if name != "facts")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that, or choose another --output") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what this version of rdtrain bench writes: remove it, or choose another --output") from None
    if not same:
        raise UserError(f"{path} was made on another machine or with other options: choose another --output, or leave out --resume")
    return rows


def _same(one: Measurement, other: Measurement) -> bool:
    """Whether two measurements are of the same case."""
    names = (
        "arm", "value", "model", "objective", "engine", "ranks", "precision", "attention", "micro_sequences", "accumulation",
        "sequence_length",
    )
    return all(getattr(one, name) == getattr(other, name) for name in names)
