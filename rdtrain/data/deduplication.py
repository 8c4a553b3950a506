"""Which documents stand for the first time, and on which side: exact duplicates by the hash of the text, in bounded memory.

Notable: the hashes are dealt out to files by their lowest bits, so that copies meet in one file, and one file after the other is sorted
in memory. A document's side is a function of its own hash, so that it stays where it is when others are added, and all copies of a text
would stand on one side.
"""

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from .encoding import RECORD

LEFT_OUT, TRAIN, VALIDATION = 0, 1, 2
BUCKET_DOCUMENTS = 1 << 19  # 12 MB of hashes
MOST_BUCKETS = 256  # open files; with more than 134 million documents the buckets grow
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])


def sort_documents(records: Iterable[Path], documents: int, validation_share: float, folder: Path) -> np.ndarray:
    """LEFT_OUT, TRAIN or VALIDATION for each document of the units whose files of records are given: uint8 [documents].

    A document is left out when its text has stood before. It is for validation when the first 64 bits of its hash, as a fraction, are
    below `validation_share`. The result is memory-mapped from sides.bin in `folder`, which must exist; a folder for the hashes comes
    and goes there. Raises OSError when the disk refuses.
    """
    buckets = folder / "hashes"
    shutil.rmtree(buckets, ignore_errors=True)
    buckets.mkdir()
    count = min(MOST_BUCKETS, -(-documents // BUCKET_DOCUMENTS))
    bound = np.uint64(int(validation_share * 2**64))
    first = 0
    with ExitStack() as stack:
        files = [stack.enter_context((buckets / str(bucket)).open("wb")) for bucket in range(count)]
        # written before it is mapped: on a full disk a write is an error, and a change in memory the end of the process (SIGBUS)
        decided = stack.enter_context((folder / "sides.bin").open("wb"))
        for file in records:
            unit = np.fromfile(file, RECORD)
            entries = np.empty(len(unit), _ENTRY)
            entries["high"], entries["low"] = unit["high"], unit["low"]
            entries["document"] = np.arange(first, first + len(unit))
            decided.write(np.where(unit["high"] < bound, np.uint8(VALIDATION), np.uint8(TRAIN)).tobytes())
            first += len(unit)
            bucket_of = entries["low"] % np.uint64(count)
            for bucket in np.unique(bucket_of):
                files[bucket].write(entries[bucket_of == bucket].tobytes())
    sides = np.memmap(folder / "sides.bin", np.uint8, "r+", shape=(documents,))
    for bucket in range(count):
        entries = np.fromfile(buckets / str(bucket), _ENTRY)
        entries = entries[np.lexsort((entries["high"], entries["low"]))]  # stable: copies stay in their order
        copies = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
        sides[entries["document"][1:][copies]] = LEFT_OUT
    shutil.rmtree(buckets)
    sides.flush()
    return sides
