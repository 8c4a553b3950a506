"""One document a row: a row holds the first T + 1 tokens of a document, from its `<s>` on, and a shorter one is padded with IGNORED.

A padded position has no target, so it counts in no loss, curve or token count; what longer documents have beyond T + 1 tokens is not
trained on. A sample is a document, in the order that `Loader` takes windows in: a function of (seed, sample number) alone.

Notable: documents are read in blocks of neighbours, and what lies between two that are long is skipped only where that saves a chunk.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..model.linear_cross_entropy import IGNORED
from .loader import BLOCK_WINDOWS, BUFFER_BLOCKS, SampleOrder
from .shards import CHUNK_TOKENS, ShardReader

PART = CHUNK_TOKENS
"""Documents whose starts are read together, a multiple of BLOCK_WINDOWS."""

PARTS_KEPT = 32
"""Parts whose starts are kept in memory, a MiB each."""


class DocumentRows:
    """Batches of documents out of shards, with the interface of `Loader`.

    Attributes: reader, sequence_length (T), samples_per_epoch (documents), order; cut, how many documents are longer than a row;
    filled, the mean share of a row's T positions that have a target; mixture, which is None: all is one stream.
    """

    mixture = None

    def __init__(self, reader: ShardReader, sequence_length: int, seed: int):
        """Reads where every document starts. UserError when there is no document, or a shard is damaged."""
        self.reader, self.sequence_length = reader, sequence_length
        self.samples_per_epoch = count_documents(reader)
        self.order = SampleOrder(self.samples_per_epoch, seed)
        self._starts = functools.lru_cache(maxsize=PARTS_KEPT)(self._read_starts)
        self.cut = targets = 0
        for part in range(-(-self.samples_per_epoch // PART)):
            lengths = np.diff(self._starts(part))
            self.cut += int((lengths > sequence_length + 1).sum())
            targets += int(np.minimum(lengths - 1, sequence_length).sum())
        self.filled = targets / (self.samples_per_epoch * sequence_length)
        # two buffers: a batch may end in one and begin in the other
        self._block = functools.lru_cache(maxsize=2 * BUFFER_BLOCKS)(self._read_block)

    def __str__(self) -> str:
        return (f"one document a row: {self.cut:,} of {self.samples_per_epoch:,} documents are cut to {self.sequence_length} + 1 tokens, "
                f"and {self.filled:.1%} of the positions have a target")

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The documents of the global samples `indices` (a range or a list of B numbers from 0): int64 [B, T + 1], IGNORED as padding.

        UserError when a shard is damaged.
        """
        epochs, places = np.divmod(np.asarray(indices, np.int64), self.samples_per_epoch)
        rows = np.empty((len(places), self.sequence_length + 1), np.int64)
        for row, document in zip(rows, self.order.windows(epochs, places)):
            block, offset = divmod(int(document), BLOCK_WINDOWS)
            row[:] = self._block(block)[offset]
        return torch.from_numpy(rows)

    def epochs(self, samples: int) -> float:
        """How often the first `samples` samples go through the documents."""
        return samples / self.samples_per_epoch

    def _read_starts(self, part: int) -> np.ndarray:
        return self.reader.document_starts(part * PART, min((part + 1) * PART, self.samples_per_epoch) + 1)

    def _read_block(self, block: int) -> np.ndarray:
        part, first = divmod(block * BLOCK_WINDOWS, PART)
        return _read_rows(self.reader, self._starts(part)[first : first + BLOCK_WINDOWS + 1], self.sequence_length)


def validation_documents(reader: ShardReader, sequence_length: int, count: int, first: int = 0) -> Tensor:
    """`count` documents in their order from document `first` on, or all there are when there are fewer, as `DocumentRows` has them: int64
    [N, T + 1].

    UserError when there is none.
    """
    starts = reader.document_starts(first, min(first + count, count_documents(reader)) + 1)
    parts = (starts[place : place + BLOCK_WINDOWS + 1] for place in range(0, len(starts) - 1, BLOCK_WINDOWS))
    rows = [_read_rows(reader, part, sequence_length) for part in parts]
    return torch.from_numpy(np.concatenate(rows)).long()


def bytes_per_target(reader: ShardReader) -> float:
    """UTF-8 bytes of text for each target of `DocumentRows`, where none is cut: a document's `<s>` is no target, and its `</s>` is one."""
    return reader.text_bytes / (len(reader) - reader.document_count)


def count_documents(reader: ShardReader) -> int:
    """The documents in shards. UserError when there is none."""
    if reader.document_count == 0:
        raise UserError(f"{reader.path} holds no document; give more text")
    return reader.document_count


def _read_rows(reader: ShardReader, starts: np.ndarray, sequence_length: int) -> np.ndarray:
    """N neighbouring documents as rows, int32 [N, sequence_length + 1]; starts [N + 1]: of each, and of the one after them."""
    starts, stops = starts[:-1], np.minimum(starts[1:], starts[:-1] + sequence_length + 1)
    rows = np.full((len(starts), sequence_length + 1), IGNORED, np.int32)
    apart = np.flatnonzero(starts[1:] - stops[:-1] > CHUNK_TOKENS) + 1
    for begin, end in zip([0, *apart], [*apart, len(rows)]):
        tokens = reader.read(int(starts[begin]), int(stops[end - 1]))
        for row in range(begin, end):
            part = tokens[starts[row] - starts[begin] : stops[row] - starts[begin]]
            rows[row, :len(part)] = part
    return rows
