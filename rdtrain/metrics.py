"""Where the numbers of a run go: metrics.jsonl always, wandb and TensorBoard with one setting each.

A record is one JSON object a line, with its step. When a run continues from a checkpoint, records of later steps are dropped
first, so that the file reads as if nothing had happened.
"""

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .data.output import write_atomically
from .distributed import World
from .errors import UserError
from .objectives import Metrics


@dataclass
class LoggingSettings:
    """What is logged, and how often.

    interval: steps between two records.
    wandb: `disabled`, `offline` (a run folder that `wandb sync` uploads later) or `online`.
    wandb_project: the project's name there.
    tensorboard: write event files into the run's folder (needs `pip install rdtrain[tensorboard]`).
    """

    interval: int = 10
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "rdtrain"
    tensorboard: bool = False

    def __post_init__(self):
        """ValueError for an interval without steps."""
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, and it is {self.interval}")


def refuse_missing(settings: LoggingSettings) -> None:
    """UserError where a package that the settings ask for is not installed: on every rank, before any of them starts."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard=true needs TensorBoard, which is not installed: `pip install rdtrain[tensorboard]`, or leave it off"
        )


class MetricLogger:
    """Writes records on rank 0; on other ranks it does nothing."""

    def __init__(self, folder: Path, settings: LoggingSettings, config: dict, name: str, world: World, resume_step: int):
        """resume_step: records of later steps are dropped. UserError when wandb or TensorBoard is asked for and cannot start."""
        self._file = self._wandb = self._tensorboard = None
        if not world.is_main:
            return
        self._path = folder / "metrics.jsonl"
        try:
            kept = [record for record in read_metrics(self._path) if record["step"] <= resume_step] if self._path.exists() else []
            write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a")
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be read or written ({error.strerror}): make it a file that can be, and start the same command again"
            ) from error
        if settings.wandb != "disabled":
            self._wandb = _start_wandb(folder, settings, config, name)
        if settings.tensorboard:
            self._tensorboard = _start_tensorboard(folder, resume_step)

    def log(self, record: dict) -> None:
        """Append one record; it must hold `step`."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                for key, value in _flat(record).items():
                    self._tensorboard.add_scalar(key, value, record["step"])
                self._tensorboard.flush()
        except OSError as error:
            for each in filter(None, (self._file, self._tensorboard)):
                with suppress(OSError):
                    each.close()  # which tries again what could not be written
            self._file = self._tensorboard = None
            raise UserError(
                f"the metrics in {self._path.parent} cannot be written ({error.strerror}): free some disk space and start the same command "
                "again to continue"
            ) from error
        if self._wandb is not None:
            self._wandb.log(_flat(record), step=record["step"])

    def close(self) -> None:
        """Finish the file and the wandb run."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl; a last line that a kill cut short is left out. UserError when another line is damaged."""
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"line {number} of {path} is not a record of metrics: mend or remove that line") from None
    return records


class MetricSums:
    """Adds up the (sums, counts) of losses over micro-batches, and divides once at the end, over all ranks."""

    def __init__(self):
        self._totals: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Metrics, skipped: Tensor) -> None:
        """Add one micro-batch's metrics, unless its step was skipped (a bool scalar), without waiting for the device."""
        for name, (sums, counts) in metrics.items():
            sums, counts = sums.masked_fill(skipped, 0), counts.masked_fill(skipped, 0)
            before = self._totals.get(name, (0, 0))
            self._totals[name] = (before[0] + sums, before[1] + counts)

    def means(self, world: World) -> dict[str, float | list[float | None]]:
        """The means over everything added on all ranks, None where nothing was counted; starts anew. A collective call."""
        result = {}
        for name, (sums, counts) in self._totals.items():
            sums, counts = world.sum(torch.stack((sums, counts)).double()).tolist()
            if isinstance(sums, float):
                result[name] = sums / counts if counts else None
            else:
                result[name] = [s / c if c else None for s, c in zip(sums, counts, strict=True)]
        self._totals.clear()
        return result


def slowest_rank(pass_seconds: float | None, waited_seconds: float, world: World) -> dict[str, float]:
    """Which rank others wait for: the time of each before it waits for another, which is its wait for data, in the mean over the steps
    since the last record, and the forward passes of the last step. Collective.

    pass_seconds: of this rank; None where they were not timed, or gather weights from all ranks, which keeps every rank at the pace of the
    slowest: then nothing is said, and neither is of one rank.
    """
    if world.size == 1 or pass_seconds is None:
        return {}
    seconds = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    seconds[world.rank] = pass_seconds + waited_seconds
    seconds = world.sum(seconds).tolist()
    median, slowest = statistics.median(seconds), max(seconds)
    return {"rank_seconds": median, "slowest_rank": seconds.index(slowest), "slowest_rank_excess": slowest / median - 1}


def _start_wandb(folder: Path, settings: LoggingSettings, config: dict, name: str):
    """The wandb run of a run's folder: a new one, or the one that an earlier start of this run has made."""
    import wandb

    known = folder / "wandb-id"
    try:
        run = wandb.init(
            project=settings.wandb_project, name=name, dir=str(folder), mode=settings.wandb, config=config,
            id=known.read_text().strip() if known.exists() else None, resume="allow", settings=wandb.Settings(console="off"),
        )
    except (wandb.errors.Error, OSError) as error:
        mend = "correct that, run `wandb login`, or set logging.wandb=offline" if settings.wandb == "online" else "correct that"
        raise UserError(f"wandb could not start ({' '.join(str(error).split())}): {mend}, or set logging.wandb=disabled") from None
    write_atomically(known, run.id + "\n")
    return run


def _start_tensorboard(folder: Path, resume_step: int):
    """A writer of one more event file of a run's folder; readers drop what earlier ones have of steps after resume_step."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
    except OSError as error:
        raise UserError(f"{folder / 'tensorboard'} cannot be written ({error.strerror}): free some disk space, or leave it off") from error


def _flat(record: dict) -> dict:
    """One number an element of lists and dictionaries, loss_by_iteration/01 and gradient_norm_by_part/core; without those that are None."""
    flat = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = {f"{index:02d}": element for index, element in enumerate(value, start=1)}
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": element for name, element in value.items()}
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if value is not None}
