"""Starts `rdtrain bench` for all jobs: those of one number of GPUs in one start of processes, those of one GPU side by side.

plan.json has every job with what became of it; a folder beside it has the bench.json and the output of each start. A start that fails, or
makes nothing for too long, is repeated without the measurement in which it failed, and the failure is on record.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.output import write_atomically
from ..errors import UserError, user_errors_as_exit
from ..hardware import GPUS, Gpu
from .jobs import Job, Model, jobs_of, order_of, room_of
from .processes import end_tree, last_words, launcher

GRACE = 45
"""Seconds that a measurement may go on when time is over."""


@dataclass
class Start:
    """Jobs that one start of processes makes one after another. folder: of its bench.json and output; device: the one GPU that it sees,
    None for as many as it has processes. failed: why, by arm."""

    jobs: list[Job]
    folder: Path
    device: str | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def measured(self) -> list[str]:
        """The arms that are in bench.json."""
        path = self.folder / "bench.json"
        return [row["arm"] for row in json.loads(path.read_text())["measurements"]] if path.exists() else []


def visible() -> tuple[list[str], Gpu | None]:
    """The GPUs that there are, as CUDA_VISIBLE_DEVICES names them, and their kind; none, and None, on the CPU. UserError for a kind whose
    memory is not known."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return [], None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    name = torch.cuda.get_device_name(0)
    kind = next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)
    if kind is None:
        raise UserError(f"what a {name} has on paper is not known: add it to rdtrain/hardware.py")
    return devices, kind


def starts_of(jobs: list[Job], folder: Path, devices: list[str]) -> list[list[Start]]:
    """Waves of starts: those of a wave run side by side. On one GPU each there are as many as GPUs, on more one alone."""
    waves = []
    for gpus in dict.fromkeys(job.gpus for job in jobs):
        here = [job for job in jobs if job.gpus == gpus]
        place = folder / here[0].model.name
        if gpus > 1:
            waves.append([Start(here, place / f"{gpus}-processes")])
            continue
        lanes = min(max(1, len(devices)), len(here))
        waves.append([
            Start(here[lane::lanes], place / f"1-process-{lane}", devices[lane] if devices else None) for lane in range(lanes)
        ])
    return waves


def command(start: Start, jobs: list[Job], options: argparse.Namespace, budget: float) -> list[str]:
    """The command line of a start for these of its jobs."""
    gpus, model = jobs[0].gpus, jobs[0].model
    processes = launcher(gpus) if gpus > 1 else [sys.executable, "-m"]
    return [
        *processes, "rdtrain.cli", "bench", str(model.config), *options.settings, "engine.compile=false", "--vocab-size",
        str(model.vocab_size), "--warmup", str(options.warmup), "--steps", str(options.steps), "--compare", *(job.arm for job in jobs),
        "--output", str(start.folder), "--resume", "--budget", f"{budget:.0f}",
    ]


def run(start: Start, options: argparse.Namespace, deadline: float) -> None:
    """Make the jobs of a start that are missing, until the deadline (of time.monotonic); failures are noted in it."""
    start.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": start.device} if start.device is not None else {})
    idle = 0  # attempts in a row that measured nothing
    while time.monotonic() < deadline:
        before = len(start.measured())
        left = [job for job in start.jobs if job.arm not in start.failed]
        if not left or {job.arm for job in left} <= set(start.measured()):
            return
        with (start.folder / "output").open("a") as output:
            process = subprocess.Popen(
                command(start, left, options, deadline - time.monotonic()), env=environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            why = _watch(process, start, options.stall, deadline)
        if process.returncode == 0 or time.monotonic() >= deadline:
            return
        missing = [job.arm for job in left if job.arm not in start.measured()]
        if not missing:
            return
        idle = idle + 1 if len(start.measured()) == before else 0
        reason = why or last_words(start.folder / "output")
        start.failed |= dict.fromkeys(missing[:1] if idle < 2 else missing, reason)  # what ails them all is no measurement's own


def _watch(process: subprocess.Popen, start: Start, stall: float, deadline: float) -> str | None:
    """Wait for a start; end it, and say why, where it stalls or goes on for too long after the deadline."""
    count, since = len(start.measured()), time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now, made = time.monotonic(), len(start.measured())
            if made != count:
                count, since = made, now
            if now > deadline + GRACE:
                return "time was over"
            if now - since > stall:
                return f"nothing was measured for {stall:.0f} s"
        return None
    finally:
        if process.poll() is None:
            end_tree(process)


def measure(options: argparse.Namespace) -> bool:
    """Measure all; whether everything that fits is there."""
    deadline = time.monotonic() + options.budget
    devices, gpu = visible()
    counts = order_of(options.counts)
    if gpu is not None and counts and max(counts) > len(devices):
        raise UserError(f"--counts asks for {max(counts)} GPUs and there are {len(devices)}: ask for as many")
    folder, everything = options.output, []
    folder.mkdir(parents=True, exist_ok=True)
    for model in map(Model.parse, options.models):
        jobs = jobs_of(model, counts, options.settings, gpu, options.compile)
        fitting = [job for job in jobs if gpu is None or job.peak <= room_of(gpu)]
        waves = starts_of(fitting, folder, devices)
        everything.append((jobs, waves))
    deadline = max(deadline, time.monotonic() + 1)  # planning takes seconds, and something must come of every call
    for _, waves in everything:
        for wave in waves:
            with ThreadPoolExecutor(len(wave)) as pool:
                list(pool.map(lambda start: run(start, options, deadline), wave))
            complete = _write_plan(folder, everything, gpu, options)
    return complete


def _write_plan(folder: Path, everything: list, gpu: Gpu | None, options: argparse.Namespace) -> bool:
    """Write plan.json; whether nothing is missing."""
    rows, complete = [], True
    for jobs, waves in everything:
        places = {id(job): start for wave in waves for start in wave for job in start.jobs}
        for job in jobs:
            start = places.get(id(job))
            made = start is not None and job.arm in start.measured()
            complete &= made or start is None
            rows.append({
                "model": job.model.name, "config": str(job.model.config), "vocab_size": job.model.vocab_size, "objective": job.objective,
                "layout": job.layout, "blocks": job.blocks, "gpus": job.gpus, "micro": job.micro, "arm": job.arm, "peak": job.peak,
                "fits": start is not None, "measured": str((start.folder / "bench.json").relative_to(folder)) if made else None,
                "failed": start.failed.get(job.arm) if start is not None and not made else None,
            })
    facts = {"gpu": gpu and gpu.name, "settings": options.settings, "warmup": options.warmup, "steps": options.steps, "complete": complete}
    write_atomically(folder / "plan.json", json.dumps(facts | {"jobs": rows}, indent=1) + "\n")
    return complete


def main() -> None:
    """Exit code 1 where something that fits is missing."""
    parser = argparse.ArgumentParser(prog="python -m rdtrain.scaling.measure", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of all jobs; before the options")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=CONFIG:VOCABULARY")
    parser.add_argument("--counts", type=int, nargs="+", required=True, help="numbers of GPUs, or of processes on the CPU")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further measurement is begun")
    parser.add_argument("--stall", type=float, default=150, help="seconds without a measurement after which a start is given up")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile where the engine can")
    options = parser.parse_args()
    with user_errors_as_exit():
        complete = measure(options)
        print(summary(options.output / "plan.json"))
        sys.exit(0 if complete else 1)


def summary(path: Path) -> str:
    """What became of the jobs of a plan.json, in some lines."""
    jobs = json.loads(path.read_text())["jobs"]
    measured, beyond = sum(job["measured"] is not None for job in jobs), sum(not job["fits"] for job in jobs)
    lines = [f"{measured} of {len(jobs)} measured, {beyond} do not fit"]
    lines += [f"{job['model']} on {job['gpus']}, {job['arm']}: {job['failed']}" for job in jobs if job["failed"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
