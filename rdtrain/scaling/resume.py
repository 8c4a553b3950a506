"""Kills a rank of a run and goes on with it on another number of GPUs and under another engine, through the launchers, as a user would.

Beside it the same run that nobody stops. What is written down: where the kill came, and how far apart the losses of both are.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ..data.output import write_atomically
from ..errors import UserError, user_errors_as_exit
from ..metrics import read_metrics
from .processes import end_tree, free_port, last_words

TRAIN = Path(__file__).parents[2] / "launch/train.py"
LIMIT, WINDOW = 0.02, 50
"""How far a loss may be off, relative, in so many steps after the resume: what bf16 makes of other sums, as in
tests/distributed/test_snapshots.py. What was not restored shows at once; later, rounding alone drives two runs apart."""


def deepspeed_command(ranks: int) -> list[str]:
    """The launcher beside this Python. UserError where there is none."""
    path = Path(sys.executable).parent / "deepspeed"
    if not path.exists():
        raise UserError(f"there is no {path}: install rdtrain into the environment of this Python")
    return [str(path), "--num_gpus", str(ranks), "--master_port", str(free_port()), "--", str(TRAIN)]


def torchrun_command(ranks: int) -> list[str]:
    """torchrun, for so many processes of a training run."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), str(TRAIN)]


def ranks_of(launcher: psutil.Process) -> list[int]:
    """The processes that a `deepspeed` command has started to train."""
    found = []
    for process in launcher.children(recursive=True):
        try:
            found += [process.pid] if any(word.startswith("--local_rank=") for word in process.cmdline()) else []
        except psutil.Error:  # it has just ended
            continue
    return found


def losses_of(folder: Path) -> dict[int, float]:
    """The loss of each step of a run."""
    return {record["step"]: record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["step"]}


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 where there is none."""
    latest = folder / "checkpoints/latest"
    return int(latest.read_text().strip().rpartition("-")[2]) if latest.exists() else 0


class Drill:
    """The runs of one kill and resume, in a folder; commands are their command lines by name."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.output.parent
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, launcher: list[str], run: str, name: str, ranks: int, *settings: str) -> subprocess.Popen:
        """A start of a run under a launcher; its output goes to NAME.log."""
        options = self.options
        micro = max(1, options.sequences // ranks)
        words = [
            "--config", str(options.config), *options.settings, f"run.folder={self.folder / run}", f"data.train={options.shards}/train",
            f"data.validation={options.shards}/validation", "schedule.training_flops=null", f"schedule.steps={options.steps}",
            f"batch.global_sequences={options.sequences}", f"batch.micro_sequences={micro}", "logging.interval=1",
            f"checkpoint.interval={options.steps // 4}", f"evaluation.interval={options.steps}", *settings,
        ]
        with (self.folder / f"{name}.log").open("w") as output:
            return subprocess.Popen([*launcher, *words], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def finish(self, process: subprocess.Popen, name: str) -> None:
        """Wait for a run's end. UserError where it fails, or takes too long."""
        try:
            code = process.wait(self.options.limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"the run {name} takes more than {self.options.limit} s: see {self.folder / name}.log") from None
        if code:
            log = self.folder / f"{name}.log"
            raise UserError(f"the run {name} ended with code {code} ({last_words(log)}): see {log}")

    def kill(self, process: subprocess.Popen) -> dict:
        """Wait for a checkpoint and a random time more, and kill a random rank; what was done. UserError where the run ends before."""
        run, draw, deadline = self.folder / "killed", random.Random(), time.monotonic() + self.options.limit
        while not newest(run):
            if process.poll() is not None or time.monotonic() > deadline:
                log = self.folder / "killed.log"
                raise UserError(f"the run to be killed made no checkpoint ({last_words(log)}): see {log}")
            time.sleep(0.02)
        known = losses_of(run)
        time.sleep(draw.uniform(0, self.options.within))
        ranks = ranks_of(psutil.Process(process.pid)) if process.poll() is None else []
        if not ranks:
            raise UserError("the run ended before its rank was killed: give --steps more of them")
        victim = draw.randrange(len(ranks))
        os.kill(ranks[victim], signal.SIGKILL)
        code = process.wait(90)
        reached = max(losses_of(run) | known)
        if code == 0 or newest(run) == self.options.steps:
            raise UserError(f"the run with a killed rank ended with code {code} at step {reached}: give --steps more of them")
        return {"rank": victim, "launcher_code": code, "step_when_killed": reached, "resumed_from": newest(run)}


def drill(options: argparse.Namespace) -> dict:
    """Train, kill, go on, and compare. UserError where any of it cannot be done."""
    work = Drill(options)
    other = options.ranks // 2 if options.ranks > 1 else 1
    zero = ("engine.name=deepspeed", "engine.zero_stage=1")
    started = []
    try:
        whole = work.start(deepspeed_command(options.ranks), "whole", "whole", options.ranks, *zero)
        started.append(whole)
        killed = work.start(deepspeed_command(options.ranks), "killed", "killed", options.ranks, *zero)
        started.append(killed)
        found = work.kill(killed)
        again = work.start(torchrun_command(other), "killed", "resumed", other, "engine.name=fsdp")
        started.append(again)
        work.finish(again, "resumed")
        if "continuing from step" not in (work.folder / "resumed.log").read_text(errors="replace"):
            raise UserError(f"the second start did not continue the first: see {work.folder / 'resumed.log'}")
        work.finish(whole, "whole")
    finally:
        for process in started:
            if process.poll() is None:
                end_tree(process)
    right, got = losses_of(work.folder / "whole"), losses_of(work.folder / "killed")
    after = [step for step in right if step > found["resumed_from"]]
    if set(got) != set(right) or len(right) != options.steps:
        raise UserError(f"the runs have the losses of {len(right)} and {len(got)} steps, of {options.steps}: see {work.folder}")
    deviation = {step: abs(got[step] - right[step]) / right[step] for step in after}
    worst = max(after[:WINDOW], key=deviation.__getitem__)
    off = deviation[worst]
    return found | {
        "steps": options.steps, "ranks": options.ranks, "engine": "ZeRO-1", "resumed_ranks": other, "resumed_engine": "FSDP2",
        "compared_steps": len(after[:WINDOW]), "largest_deviation": off, "at_step": worst, "limit": LIMIT, "equal": off <= LIMIT,
        "largest_deviation_to_the_end": max(deviation.values()),
        "identical_before": all(got[step] == right[step] for step in right if step <= found["resumed_from"]),
        "losses": {"whole": right, "killed": got},
    }


def main() -> None:
    """Exit code 1 where the losses are not equal."""
    parser = argparse.ArgumentParser(prog="python -m rdtrain.scaling.resume", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of all runs; before the options")
    parser.add_argument("--shards", type=Path, required=True, help="folder with train and validation shards")
    parser.add_argument("--ranks", type=int, required=True, help="processes of the run that is killed; half as many go on")
    parser.add_argument("--steps", type=int, default=200, help="of the run; a quarter of them between checkpoints")
    parser.add_argument("--sequences", type=int, default=16, help="of the global batch")
    parser.add_argument("--within", type=float, default=1.0, help="seconds after the first checkpoint, within which the kill comes")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a run may take")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; runs are beside it")
    options = parser.parse_args()
    with user_errors_as_exit():
        found = drill(options)
        write_atomically(options.output, json.dumps(found, indent=1) + "\n")
        print(
            f"rank {found['rank']} of {found['ranks']} killed in step {found['step_when_killed']}, gone on from step "
            f"{found['resumed_from']} on {found['resumed_ranks']} under FSDP2: losses within {found['largest_deviation']:.1e}"
        )
        sys.exit(0 if found["equal"] else 1)


if __name__ == "__main__":
    main()
