"""The folder of a run: who may write there, whether this is the same run, and what is on record about it.

    config.yaml        the whole config, defaults included
    run.json           command, versions, device, model size, FLOPs: what a report quotes
    metrics.jsonl      one record a line
    checkpoints/       see checkpoint.py
    wandb/             where wandb is on
"""

import fcntl
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from .config import Config, config_to_yaml, load_config
from .data.output import write_atomically
from .distributed import World
from .errors import UserError
from .objectives.cuda_graph import captured_bytes


@contextmanager
def claimed(config: Config, world: World, wait_seconds: float = 45) -> Iterator[Path]:
    """The run's folder, made or taken up again, and locked against other runs while the block lasts; rank 0 holds the lock.

    Waits for a process of the same run that is still shutting down. UserError when the folder belongs to another config, holds
    something else, or stays in use.
    """
    folder = Path(config.run.folder)
    if not world.is_main:
        yield folder
        return
    recorded = folder / "config.yaml"
    try:
        refuse_unusable(config)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None
    with lock:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is training in {folder}: wait for it to end, or choose another run.folder"
                    ) from None
                time.sleep(0.5)
        refuse_unusable(config)  # again, under the lock: two starts at once must not mix their configs
        write_atomically(recorded, config_to_yaml(config))
        yield folder


def refuse_unusable(config: Config) -> None:
    """UserError where the run's folder belongs to another config, holds something else or cannot be written; changes nothing."""
    folder = Path(config.run.folder)
    recorded = folder / "config.yaml"
    try:
        if recorded.exists() and recorded.stat().st_size:
            _refuse_other_config(recorded, config)
        elif (folder / "checkpoints").exists():
            raise UserError(
                f"{folder} has checkpoints, and its config.yaml is missing or empty: put it back (`config` in a checkpoint's state.json is "
                "what it was), or choose another run.folder"
            )
        elif folder.exists() and any(path.name not in (".lock", "config.yaml", "config.yaml.tmp") for path in folder.iterdir()):
            raise UserError(f"the output folder {folder} exists and is not a run of rdtrain: choose another run.folder or empty it")
    except OSError as error:  # it is a file, or its name is too long
        raise _unwritable(folder, error.strerror) from None
    there = standing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{there} " + ("may not be written to" if there.is_dir() else "is a file"))


def standing(path: Path) -> Path:
    """The nearest of a path and the folders above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # False too for a name that is too long


def _unwritable(folder: Path, reason: str) -> UserError:
    return UserError(f"the run folder {folder} cannot be written ({reason}): choose a run.folder that can be")


def _refuse_other_config(recorded: Path, config: Config) -> None:
    before, now = load_config(recorded).result_settings(), config.result_settings()
    for section, values in now.items():
        pairs = {section: (before[section], values)}
        if isinstance(values, dict):
            pairs = {f"{section}.{key}": (before[section][key], value) for key, value in values.items()}
        for name, (old, new) in pairs.items():
            if old != new and not _mixture_may_change(name, old, new, config):
                hint = ", or set data.change_mixture=true to go on with the new one" if name == "data.mixture" and old and new else ""
                raise UserError(
                    f"the output folder {recorded.parent} holds a run with {name}={old}, and this one has {new}: choose another "
                    f"run.folder, or delete that one{hint}"
                )


def _mixture_may_change(name: str, old: object, new: object, config: Config) -> bool:
    """Whether a setting that differs is of the mixture, and the config allows that; folders that both have must be the same."""
    if not config.data.change_mixture:
        return False
    if name == "data.train" and isinstance(old, dict) and isinstance(new, dict):
        return all(old[folder] == new[folder] for folder in old.keys() & new.keys())
    return name == "data.mixture" and bool(old) and bool(new)


def record_facts(folder: Path, facts: dict) -> None:
    """Write run.json."""
    write_atomically(folder / "run.json", json.dumps(facts, indent=2) + "\n")


def start_facts(device: str) -> dict:
    """The command, time, machine, versions and commit of this start; device: `cuda` or `cpu`."""
    packages = ("rdtrain", "torch", "deepspeed", "transformers", "zarr", "sentencepiece")
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
    }


def _processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source
        return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, and whether files differ from it; None where it is no checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment may lie in a checkout of something else
        return git("rev-parse", "HEAD") + (", with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def config_like(run: Path, overrides: list[str]) -> Config:
    """The config that repeats a run from its own record, in the folder `RUN-again` unless an override says otherwise; whatever bears on
    the result and is not as it was then is said on standard error. UserError where there is no record, or the folder would be that of the
    run itself."""
    recorded = run / "config.yaml"
    try:
        facts = json.loads((run / "run.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{run} has no record of a run (run.json): give a run.folder, or --config") from None
    again = json.dumps(f"{run}-again", ensure_ascii=False)  # quoted: YAML takes what follows " #" for a comment
    config = load_config(recorded, [f"run.folder={again}", *overrides])
    if Path(config.run.folder).resolve() == run.resolve():
        raise UserError(f"run.folder={config.run.folder} is the run to be repeated: give another, or start with --config to continue it")
    world = World.from_environment()
    now = start_facts(world.device.type)
    pairs = {"ranks": world.size, "device": world.device.type} | {name: now[name] for name in ("machine", "python", "versions", "commit")}
    changed = [f"{name} was {facts.get(name)} and is {value}" for name, value in pairs.items() if facts.get(name) != value]
    if changed and world.is_main:
        print(f"rdtrain: this is not as it was in {run}: {'; '.join(changed)}", file=sys.stderr)
    return config


class PeakMemory:
    """The largest memory this process has held since this object was made, in bytes.

    On CUDA, what PyTorch allocated, and what CUDA graphs keep for themselves. On CPU, the process's peak resident size less its size at
    the start, so that libraries which are loaded before do not count.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._start = 0 if device.type == "cuda" else psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) + captured_bytes(self._device)
        return _peak_resident_bytes() - self._start


def _peak_resident_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:  # not Linux: macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
