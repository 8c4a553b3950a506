"""`rdtrain watch RUN ...`: runs in a terminal, while they train or afterwards.

Everything is read from the run's folder, so that any machine that sees it can watch, and nothing of the run waits for it. Several runs
are a table; one is a whole page: progress, losses as curves, the loss of each iteration. Notable: only what has been appended to
metrics.jsonl since the last look is read, and all of it again when the file has become shorter, as it does when a run continues.
"""

import fcntl
import io
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .data.output import write_atomically
from .errors import UserError
from .hardware import model_flops_utilization
from .tables import bytes_text

BARS = " ▁▂▃▄▅▆▇█"
CURVE = 60  # columns of a curve
RECENT = 10  # records of which means are taken
# What is shown of run.json, which may be of another version.
NEEDED = (
    "name", "objective", "total_steps", "parameters", "training_flops_per_token", "ranks", "machine", "device", "precision", "started",
)


@dataclass
class WatchedRun:
    """A run's folder, and what has been read of it so far. facts: of run.json; records: of metrics.jsonl."""

    folder: Path
    facts: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    running: bool = False
    _read: int = 0

    def look(self) -> None:
        """Read what is new. UserError where the folder is not that of a run."""
        try:
            self.facts = dict(json.loads((self.folder / "run.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"{self.folder} is not the folder of a run that has started (no run.json): give a run.folder, or wait while it compiles"
            ) from None
        missing = [name for name in NEEDED if name not in self.facts]
        if missing:
            raise UserError(f"{self.folder}/run.json has no {', '.join(missing)}: watch the run with the version of rdtrain that wrote it")
        self.running = _locked(self.folder / ".lock")
        path = self.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < self._read:
            self.records, self._read = [], 0
        if size > self._read:
            with path.open("rb") as file:
                file.seek(self._read)
                whole, newline, _ = file.read(size - self._read).rpartition(b"\n")  # the last line may be half written
            for line in whole.splitlines():
                try:
                    record = json.loads(line)
                    record["step"]
                    self.records.append(record)
                except (ValueError, TypeError, KeyError):
                    raise UserError(f"a line of {path} is not a record of metrics: mend or remove that line") from None
            self._read += len(whole) + len(newline)

    @property
    def step(self) -> int:
        """Of the last record."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def state(self) -> str:
        """`running`, `complete` or `stopped`."""
        target = self.facts.get("until_nll")
        reached = target is not None and any(nll <= target for _, nll in self.values("validation_nll"))
        return "complete" if reached or self.step >= self.facts["total_steps"] else "running" if self.running else "stopped"

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each record that has this metric."""
        return [(record["step"], record[name]) for record in self.records if isinstance(record.get(name), (int, float))]

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((record[name] for record in reversed(self.records) if record.get(name) is not None), None)

    def recent(self, name: str) -> float | None:
        """The mean of its last values."""
        values = [value for _, value in self.values(name)[-RECENT:]]
        return sum(values) / len(values) if values else None

    def recent_by(self, name: str) -> list[float | None]:
        """The means of a list of losses, by iteration or noise level, over the last records; None where none of them drew it."""
        lists = [record[name] for record in self.records if record.get(name)][-RECENT:]
        known = ([loss for loss in losses if loss is not None] for losses in zip(*lists))
        return [sum(losses) / len(losses) if losses else None for losses in known]

    @property
    def mfu(self) -> float | None:
        """Model FLOPs a second as a share of the GPUs' on paper; None where that is not known."""
        speed = self.recent("tokens_per_second")
        return model_flops_utilization(speed * self.facts["training_flops_per_token"], self.facts) if speed else None

    def recent_by_part(self, name: str) -> dict[str, float]:
        """The means of a metric that has a value for each part of the model, of those that have one."""
        found: dict[str, list[float]] = {}
        for record in [record[name] for record in self.records if record.get(name)][-RECENT:]:
            for part, value in record.items():
                found.setdefault(part, []).extend([] if value is None else [value])
        return {part: sum(values) / len(values) for part, values in found.items() if values}

    @property
    def slowest_rank(self) -> tuple[int, float] | None:
        """The rank that was the slowest of the last records' most often, and how far it then was above the median in the mean."""
        records = [record for record in self.records if record.get("slowest_rank") is not None][-RECENT:]
        if not records:
            return None
        rank = statistics.mode(record["slowest_rank"] for record in records)
        return rank, statistics.mean(record["slowest_rank_excess"] for record in records if record["slowest_rank"] == rank)

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the speed of the last records."""
        seconds = self.recent("step_seconds")
        return None if seconds is None else seconds * (self.facts["total_steps"] - self.step)


def watch_runs(folders: list[Path], interval: float, once: bool, picture: Path | None = None) -> None:
    """Show runs until they have all ended or Ctrl-C, every `interval` seconds; with `once`, or where standard output is no terminal, one
    time. picture: an SVG file of what is seen at the start, written beside. UserError where a folder is not that of a run, or the file
    cannot be written."""
    runs = [WatchedRun(folder) for folder in folders]
    console = plain_console()
    for run in runs:
        run.look()
    if picture is not None:
        _write_picture(runs, picture)
    if once or not console.is_terminal:
        console.print(view(runs))
        return
    with Live(view(runs), console=console, auto_refresh=False, screen=False) as live:
        try:
            while any(run.state == "running" for run in runs):
                time.sleep(interval)
                for run in runs:
                    run.look()
                live.update(view(runs), refresh=True)
        except KeyboardInterrupt:
            pass


def _write_picture(runs: list[WatchedRun], path: Path) -> None:
    """The view in a terminal wide enough for it, as SVG."""
    wide = 120 if len(runs) == 1 else 160
    console = plain_console(width=wide, file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor")
    console.print(view(runs))
    words = ["rdtrain watch", *(str(run.folder) for run in runs)]
    try:
        write_atomically(path, console.export_svg(title=" ".join(words)))
    except OSError as error:
        raise UserError(f"the picture {path} cannot be written ({error.strerror}): choose another --svg") from None


def plain_console(**settings) -> Console:
    """A console that shows names as they are: rich would take what stands in brackets or between colons for styles and pictures."""
    return Console(markup=False, emoji=False, **settings)


def view(runs: list[WatchedRun]) -> RenderableType:
    """One run as a page, several as a table with their curves."""
    return _page(runs[0]) if len(runs) == 1 else _overview(runs)


def _page(run: WatchedRun) -> RenderableType:
    facts, total = run.facts, run.facts["total_steps"]
    head = Text.assemble(
        (facts["name"], "bold"), f"  {run.state}  step {run.step:,} of {total:,}",
        f"  {_left(run)}" if run.state == "running" else "",
        f"\n{facts['parameters'] / 1e6:,.1f}M parameters, {facts['objective']['name']}, {facts['ranks']} x {facts['machine']}, "
        f"{facts['precision']}, since {facts['started']}",
    )
    numbers = Table.grid(padding=(0, 3))
    for row in _numbers(run):
        numbers.add_row(*row)
    bar = Table.grid()  # a bar alone would leave its line open
    bar.add_row(ProgressBar(total=total, completed=min(run.step, total), width=CURVE))
    curves = Table.grid(padding=(0, 1))
    for name, label in (("loss", "training loss"), ("validation_nll", "held-out NLL")):
        values = [value for _, value in run.values(name)]
        if values:
            curves.add_row(label, f"{max(values):.3f}", Text(bars(values, CURVE), style="cyan"), f"{values[-1]:.3f}")
    for name, over in (("loss_by_iteration", "iterations 1 to {}"), ("loss_by_noise_level", "noise, low to high, in {} bins")):
        losses = run.recent_by(name)
        if any(losses):
            top = max(loss for loss in losses if loss is not None)
            curves.add_row("loss", f"{top:.3f}", Text(bars(losses, len(losses), least=0.0), style="green"), over.format(len(losses)))
    parts = [head, bar, numbers, curves]
    by_part = [run.recent_by_part(name) for name in ("gradient_norm_by_part", "update_size_by_part")]
    if any(by_part):
        table = Table.grid(padding=(0, 3))
        table.add_row("", *by_part[0])
        for label, values in zip(("gradient norm", "update / weight"), by_part):
            table.add_row(label, *(_number(values.get(part)) for part in by_part[0]))
        parts.append(table)
    return Panel(Group(*parts), title=Text(str(run.folder)), title_align="left")


def _numbers(run: WatchedRun) -> list[tuple[str, ...]]:
    """Rows of name and value, two pairs each."""
    newest = (run.folder / "checkpoints/latest")
    best = min((value for _, value in run.values("validation_nll")), default=None)
    pairs = [
        ("loss", _number(run.recent("loss"))), ("held-out NLL", f"{_number(run.last('validation_nll'))}, best {_number(best)}"),
        ("learning rate", _number(run.last("learning_rate"))), ("gradient norm", _number(run.recent("gradient_norm"))),
        ("tokens/s", _number(run.recent("tokens_per_second"))), ("ms a step", _number(_times(1000, run.recent("step_seconds")))),
        ("MFU", "-" if run.mfu is None else f"{run.mfu:.1%}"), ("peak memory", bytes_text(run.last("peak_memory_bytes") or 0)),
        ("tokens", _number(run.last("tokens"))), ("training FLOPs", f"{run.last('training_flops') or 0:.2e}"),
        ("skipped steps", _number(run.last("skipped_steps"))),
        ("waiting for data", f"{_number(_times(1000, run.recent('data_wait_seconds')))} ms a step"),
        ("slowest rank", "-" if run.slowest_rank is None else "{}, median {:+.0%}".format(*run.slowest_rank)),
        ("newest checkpoint", newest.read_text().strip() if newest.exists() else "none"),
    ]
    return [(*first, *second) for first, second in zip(pairs[::2], pairs[1::2])]


def _overview(runs: list[WatchedRun]) -> RenderableType:
    """A row for each run; what none of them has is left out, so that 80 characters are enough for most."""
    rows = [
        {
            "run": run.facts["name"], "state": run.state, "step": f"{run.step:,}/{run.facts['total_steps']:,}",
            "loss": _number(run.recent("loss")), "held-out\nNLL": _number(run.last("validation_nll")),
            "tokens/s": _number(run.recent("tokens_per_second")), "MFU": "-" if run.mfu is None else f"{run.mfu:.1%}",
            "peak\nmemory": bytes_text(run.last("peak_memory_bytes") or 0), "skipped": _number(run.last("skipped_steps")),
            "": _left(run) if run.state == "running" else "", "NLL so far": bars([nll for _, nll in run.values("validation_nll")], 10),
        }
        for run in runs
    ]
    table = Table(box=box.SIMPLE, padding=0, show_edge=False)
    shown = [name for name in rows[0] if any(row[name] not in ("", "-") for row in rows)]
    for name in shown:  # a long name of a run takes several lines, before a number loses its end
        table.add_column(name, justify="left" if name in ("run", "state", "NLL so far") else "right", no_wrap=name != "run")
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def bars(values: list[float | None], columns: int, least: float | None = None) -> str:
    """Values as at most so many bars, each the mean of its part of them, and a blank for None. least: of the scale; None for their own."""
    columns = min(columns, len(values))
    means = []
    for column in range(columns):
        start, stop = (place * len(values) // columns for place in (column, column + 1))
        part = [value for value in values[start:stop] if value is not None]
        means.append(sum(part) / len(part) if part else None)
    known = [mean for mean in means if mean is not None and math.isfinite(mean)]
    if not known:
        return " " * columns
    low, high = min(known) if least is None else least, max(known)
    height = (high - low) or 1.0
    steps = len(BARS) - 2
    return "".join(" " if mean not in known else BARS[1 + round(steps * max(0.0, mean - low) / height)] for mean in means)


def _left(run: WatchedRun) -> str:
    seconds = run.seconds_left
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _locked(lock: Path) -> bool:
    """Whether a process holds the run's lock, on any machine whose file system shares locks."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
