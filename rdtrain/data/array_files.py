"""From finished units to the files of the final arrays: each shard file is computed for itself, by one worker.

Notable: where every unit's kept documents begin in the arrays is known before (a `Layout`), so that a shard needs only the units that
reach into it, and any number of workers writes the same bytes.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .deduplication import TRAIN, VALIDATION
from .encoding import RECORD, unit_file
from .output import file_facts

SIDES = {".": TRAIN, "train": TRAIN, "validation": VALIDATION}  # by their folders; "." when there is no validation side


@dataclass(frozen=True)
class Layout:
    """Where everything is. work: the folder of the work; units: the folders that hold unit k as number k modulo their count; dtype; chunk
    and shard: their sizes in numbers."""

    work: Path
    units: tuple[Path, ...]
    dtype: str
    chunk: int
    shard: int

    def unit(self, number: int, ending: str) -> Path:
        """One of the files of unit `number`."""
        return unit_file(self.units[number % len(self.units)], number, ending)


class ShardTask(NamedTuple):
    """A shard file to write: `number` of `array` ("tokens" or "documents") on `side`."""

    side: str
    array: str
    number: int


def create_arrays(layout: Layout, side: str, tokens: int, documents: int) -> None:
    """Creates the group and the two arrays of a side, empty."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    group = zarr.create_group(layout.work / "result" / side / "arrays.zarr")
    # shuffling bits makes token numbers larger, as they have no order; level 3 packs them a tenth smaller, and takes two thirds longer, a
    # fiftieth of all the time; a chunk of zeros is written like any other
    compressors = (BloscCodec(cname="zstd", clevel=2, shuffle="noshuffle"), Crc32cCodec())
    for name, dtype, length in (("tokens", layout.dtype, tokens), ("documents", "int64", documents + 1)):
        group.create_array(name, shape=(length,), dtype=dtype, chunks=(layout.chunk,), shards=(layout.shard,), fill_value=0,
                           compressors=compressors, config={"write_empty_chunks": True})


def shard_tasks(layout: Layout, side: str, tokens: int, documents: int) -> list[ShardTask]:
    """The shards of a side's arrays."""
    lengths = {"tokens": tokens, "documents": documents + 1}
    return [ShardTask(side, name, number) for name, length in lengths.items() for number in range(-(-length // layout.shard))]


def shard_state(layout: Layout, task: ShardTask) -> Path:
    """The file that says that a shard is done: the bytes and SHA-256 of its file."""
    return layout.work / "done" / f"{task.side}-{task.array}-{task.number}.json"


def write_shard(task: ShardTask, layout: Layout) -> ShardTask:
    """Writes a shard file, and then its state. Raises OSError when the disk refuses."""
    array = _open_array(layout, task.side, task.array)
    first = task.number * layout.shard
    last = min(first + layout.shard, array.shape[0])
    array[first:last] = (_tokens if task.array == "tokens" else _offsets)(layout, task.side, first, last)
    file = layout.work / "result" / task.side / "arrays.zarr" / task.array / "c" / str(task.number)
    state = shard_state(layout, task)
    temporary = state.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(file_facts(file)))
    temporary.replace(state)
    return task


class Kept(NamedTuple):
    """The documents of a unit that are kept on a side: where each begins in the unit's tokens, its number of tokens, and its bytes of
    text; int64 [N] all."""

    begins: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray


def kept_documents(layout: Layout, side: str, unit: int, documents: np.ndarray | None = None) -> Kept:
    """documents: where the documents of each unit begin among those of all, if not yet in starts.npz."""
    documents = _starts(layout.work)["documents"] if documents is None else documents
    records = np.fromfile(layout.unit(unit, "records"), RECORD)
    kept = _sides(layout.work)[documents[unit]:documents[unit + 1]] == SIDES[side]
    lengths = records["tokens"]
    return Kept((np.cumsum(lengths) - lengths)[kept], lengths[kept], records["bytes"][kept])


def _tokens(layout: Layout, side: str, first: int, last: int) -> np.ndarray:
    """Tokens first .. last - 1 of a side."""
    starts = _starts(layout.work)[f"{side} tokens"]
    tokens = np.empty(last - first, layout.dtype)
    for unit in range(np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, last, "left")):
        begins, lengths, _ = kept_documents(layout, side, unit)
        if not len(lengths):
            continue
        content = np.memmap(layout.unit(unit, "tokens"), layout.dtype, "r")
        places = starts[unit] + np.cumsum(lengths) - lengths  # of the documents, in the array
        for begin, length, place in zip(begins.tolist(), lengths.tolist(), places.tolist()):
            low, high = max(place, first), min(place + length, last)
            if low < high:
                tokens[low - first:high - first] = content[begin + low - place:begin + high - place]
    return tokens


def _offsets(layout: Layout, side: str, first: int, last: int) -> np.ndarray:
    """Numbers first .. last - 1 of the array of document starts, whose last number is that of all tokens."""
    token_starts, starts = _starts(layout.work)[f"{side} tokens"], _starts(layout.work)[f"{side} documents"]
    offsets = np.full(last - first, token_starts[-1], np.int64)
    for unit in range(np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, last, "left")):
        if unit + 1 == len(starts):
            continue  # only the end is left
        lengths = kept_documents(layout, side, unit).lengths
        places = token_starts[unit] + np.cumsum(lengths) - lengths
        low, high = max(starts[unit], first), min(starts[unit + 1], last)
        offsets[low - first:high - first] = places[low - starts[unit]:high - starts[unit]]
    return offsets


def forget_open_files() -> None:
    """Called before files of the work are written anew in this process."""
    for cache in (_starts, _sides, _open_array):
        cache.cache_clear()


@functools.lru_cache(maxsize=1)
def _starts(work: Path) -> dict[str, np.ndarray]:
    """For "documents" (of all units together), "SIDE tokens", "SIDE documents" and "SIDE bytes": where each unit's begin, and at the end
    how many there are; int64 [units + 1]."""
    with np.load(work / "starts.npz") as arrays:
        return dict(arrays)


@functools.lru_cache(maxsize=1)
def _sides(work: Path) -> np.ndarray:
    return np.memmap(work / "sides.bin", np.uint8, "r")


@functools.lru_cache(maxsize=2)
def _open_array(layout: Layout, side: str, name: str):
    import zarr
    from numcodecs import blosc

    blosc.set_nthreads(1)  # there are as many workers as cores
    return zarr.open_array(layout.work / "result" / side / "arrays.zarr" / name, mode="r+")
