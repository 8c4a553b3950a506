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
        raise UserError(f"the run folder {folder} cannot be made ({error.strerror}): choose a run.folder that can be written") from None
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
        if recorded.exists():  # looked at under the lock: two starts at once must not mix their configs
            _refuse_other_config(recorded, config)
        write_atomically(recorded, config_to_yaml(config))
        yield folder


def refuse_unusable(config: Config) -> None:
    """UserError where the run's folder belongs to another config or holds something else; changes nothing."""
    folder = Path(config.run.folder)
    recorded = folder / "config.yaml"
    if recorded.exists():
        _refuse_other_config(recorded, config)
    elif folder.exists() and any(path.name not in (".lock", "config.yaml.tmp") for path in folder.iterdir()):
        raise UserError(f"the output folder {folder} exists and is not a run of rdtrain: choose another run.folder or empty it")


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
    """The command, time, machine and versions of this start; device: `cuda` or `cpu`."""
    packages = ("rdtrain", "torch", "deepspeed", "transformers", "zarr", "sentencepiece")
    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
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


class PeakMemory:
    """The largest memory this process has held since this object was made, in bytes.

    On CUDA, what PyTorch allocated. On CPU, the process's peak resident size less its size at the start, so that libraries which
    are loaded before do not count.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._start = 0 if device.type == "cuda" else psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_resident_bytes() - self._start


def _peak_resident_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:  # not Linux: macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
