"""`rdtrain shard read-benchmark`: how fast training samples are read, beside other ways to read the same windows in the same order.

Notable: every way gives the batches of the training loop, int64 [B, T + 1], in its shuffled order. np.memmap reads the tokens as they are,
uncompressed and without checksums, from a file that is written for it; all others read the shards. The files are read again and again, so
that they are in the machine's memory: what is measured is the work. The ways take turns, and the best turn of each counts.
"""

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from ..errors import UserError
from .loader import Loader, read_ahead
from .shards import ShardReader

TURNS = 3
COPY_TOKENS = 1 << 22
CACHE_BYTES = 1 << 26  # of tensorstore's, for chunks that it has decoded


class _ZarrReader:
    """As much of a `ShardReader` as a loader needs, by zarr's own reading."""

    def __init__(self, reader: ShardReader):
        self.path, self.manifest, self._length = reader.path, reader.manifest, len(reader)
        self._tokens = zarr.open_group(Path(reader.path) / "arrays.zarr", mode="r")["tokens"]

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1."""
        return np.asarray(self._tokens[start:stop])


def read_benchmark(shards: Path, folder: Path, sequence_length: int, batch: int, seconds: float) -> str:
    """A table in Markdown. seconds: of each turn of each way. folder: for the uncompressed copy; it is deleted at the end.

    UserError when that exists or cannot be written, and when `shards` is no folder of whole shards on this machine.
    """
    reader = ShardReader(shards)
    if not (shards / "arrays.zarr").is_dir():
        raise UserError(f"{shards} is not a folder of shards on this machine; copy them into one")
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder to work in")
    if min(sequence_length, batch) < 1 or seconds <= 0:
        raise UserError("--sequence-length, --batch and --seconds must be positive; leave them out for their defaults")
    loader = Loader(reader, sequence_length, seed=0)
    order = partial(_starts, loader)
    try:
        folder.mkdir(parents=True)
        copy = _copy(reader, folder / "tokens.bin")
        ways = {
            "rdtrain": lambda: Loader(reader, sequence_length, seed=0).batch,
            "np.memmap, uncompressed": lambda: _window_by_window(lambda start: copy[start:start + sequence_length + 1], order),
            "zarr, in the loader's blocks": lambda: Loader(_ZarrReader(reader), sequence_length, seed=0).batch,
            "zarr, a window a read": lambda: _window_by_window(_zarr_windows(reader, sequence_length), order),
        }
        if importlib.util.find_spec("tensorstore"):
            ways["tensorstore, a window a read"] = lambda: _tensorstore_batches(shards, sequence_length, order)
        rates: dict[str, list[tuple[float, float]]] = {}
        for _ in range(TURNS):
            for name, way in ways.items():
                rates.setdefault(name, []).append(_rate(way(), sequence_length, batch, seconds))
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); make room there or choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    best = {name: tuple(map(max, zip(*turns))) for name, turns in rates.items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [f"{len(reader):,} tokens in windows of {sequence_length} + 1, batches of {batch}, {cores} cores, load {os.getloadavg()[0]:.1f}",
            "", "| read by | million tokens/s | of rdtrain's | million tokens a processor second | of rdtrain's |", "|---|--:|--:|--:|--:|"]
    ours = best["rdtrain"]
    rows += [f"| {name} | {rate / 1e6:.2f} | {rate / ours[0]:.1%} | {own / 1e6:.2f} | {own / ours[1]:.1%} |"
             for name, (rate, own) in best.items()]
    if not importlib.util.find_spec("tensorstore"):
        rows += ["", "tensorstore is not installed; `pip install tensorstore` adds its row."]
    return "\n".join(rows)


def _rate(make_batch: Callable[[Sequence[int]], Tensor], length: int, batch: int, seconds: float) -> tuple[float, float]:
    """Tokens a second, by the clock and by the time that processors spent, all threads together; batches are read ahead as in training."""
    with closing(read_ahead(lambda step: make_batch(range(step * batch, (step + 1) * batch)), 0, 1 << 40)) as batches:
        next(batches)  # what is opened and started for the first
        count, started, processor = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < seconds:
            next(batches)
            count += 1
        tokens = count * batch * length
        return tokens / (time.perf_counter() - started), tokens / (time.process_time() - processor)


def _starts(loader: Loader, indices: Sequence[int]) -> list[int]:
    """The first tokens of the windows of samples."""
    epochs, places = np.divmod(np.asarray(indices), loader.samples_per_epoch)
    return (loader.order.windows(epochs, places) * loader.sequence_length).tolist()


def _window_by_window(read: Callable[[int], np.ndarray], order: Callable[[Sequence[int]], list[int]]) -> Callable[[Sequence[int]], Tensor]:
    return lambda indices: torch.from_numpy(np.stack([read(start) for start in order(indices)]).astype(np.int64))


def _zarr_windows(reader: ShardReader, length: int) -> Callable[[int], np.ndarray]:
    by_zarr = _ZarrReader(reader)
    return lambda start: by_zarr.read(start, start + length + 1)


def _copy(reader: ShardReader, file: Path) -> np.ndarray:
    """The tokens as a file that is mapped into memory, [tokens]; written as one that is not, where a full disk is an OSError."""
    with file.open("wb") as stream:
        for start in range(0, len(reader), COPY_TOKENS):
            stream.write(reader.read(start, min(start + COPY_TOKENS, len(reader))).tobytes())
    return np.memmap(file, reader.manifest["dtype"], "r")


def _tensorstore_batches(shards: Path, length: int, order: Callable[[Sequence[int]], list[int]]) -> Callable[[Sequence[int]], Tensor]:
    """All windows of a batch asked for at once, with a cache of decoded chunks."""
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    place = {"driver": "file", "path": str((shards / "arrays.zarr" / "tokens").resolve())}
    tokens = tensorstore.open({"driver": "zarr3", "kvstore": place}, context=context, read=True).result()

    def batch(indices: Sequence[int]) -> Tensor:
        windows = [tokens[start:start + length + 1].read() for start in order(indices)]
        return torch.from_numpy(np.stack([window.result() for window in windows]).astype(np.int64))

    return batch
