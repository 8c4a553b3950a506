"""Which tokens are trained on in which step: a function of (seed, step) alone, so there is no position to save.

The token stream is cut into windows of `sequence_length` + 1 tokens, window i starting at token i * sequence_length, across
documents. Sample number n of a run (0, 1, 2, ...) is place n % windows of epoch n // windows; each epoch visits each window once,
in an order of its own. Step s trains on samples s * global_batch .. (s + 1) * global_batch - 1, whatever the number of ranks and
the size of the micro-batch.

Notable: single reads from shards are slow and long ones fast, so the order has two levels, both by arithmetic (no table, no
state): blocks of 64 neighbouring windows are permuted, then the windows of 16 consecutive blocks are, a buffer. Two buffers are
kept in memory, the one that is in use and the one after it. `rdtrain.data.mixture` draws from several streams by weights.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from ..errors import UserError
from .shards import ShardReader

BLOCK_WINDOWS = 64
BUFFER_BLOCKS = 16
FEISTEL_ROUNDS = 6
STEPS_AHEAD = 4

Item = TypeVar("Item")


class SampleOrder:
    """A permutation of the windows 0 .. samples - 1 for each epoch, computed in O(1) time and memory for each place.

    The blocks of `block` neighbouring windows come in permuted order, but for a shorter last one, which stays last; then the
    windows of each `buffer_blocks` consecutive blocks are permuted among themselves.
    """

    def __init__(self, samples: int, seed: int, block: int = BLOCK_WINDOWS, buffer_blocks: int = BUFFER_BLOCKS):
        """samples, block and buffer_blocks are at least 1 (ValueError otherwise); seed is any integer from 0 to 2**64 - 1."""
        if min(samples, block, buffer_blocks) < 1:
            raise ValueError(f"samples {samples}, block {block} and buffer_blocks {buffer_blocks} must be at least 1")
        self.samples = samples
        self.seed = seed
        self.block = block
        self.buffer = block * buffer_blocks

    def window(self, epoch: int, place: int) -> int:
        """The window at `place` (0 .. samples - 1) of `epoch` (0, 1, 2, ...)."""
        return int(self.windows(np.array([epoch]), np.array([place]))[0])

    def windows(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The windows [N], int64, at `places` [N] (0 .. samples - 1 each) of `epochs` [N]."""
        keys = _mix(np.uint64(self.seed) + _mix(epochs.astype(np.uint64)))
        buffers, places = np.divmod(places.astype(np.int64), self.buffer)
        sizes = np.minimum(self.samples - buffers * self.buffer, self.buffer)
        places = buffers * self.buffer + _permute(places, sizes, _mix(keys + np.uint64(1)) + buffers.astype(np.uint64))
        slots, offsets = np.divmod(places, self.block)
        full_blocks = np.full_like(slots, self.samples // self.block)
        blocks = np.where(slots < full_blocks, _permute(np.minimum(slots, full_blocks - 1), full_blocks, keys), slots)
        return blocks * self.block + offsets


class Loader:
    """Batches of token windows out of shards, or out of a range of their tokens, in the order of `SampleOrder`.

    Attributes: reader, sequence_length (T), samples_per_epoch (windows), order; mixture, which is None: all is one stream.
    """

    mixture = None

    def __init__(self, reader: ShardReader, sequence_length: int, seed: int, first_token: int = 0, tokens: int | None = None):
        """first_token, tokens: the range; without `tokens` up to the end. UserError when it has fewer than sequence_length + 1 tokens."""
        self.reader = reader
        self.sequence_length = sequence_length
        self._first, self._stop = first_token, len(reader) if tokens is None else first_token + tokens
        self.samples_per_epoch = _count_windows(reader, sequence_length, self._stop - self._first)
        self.order = SampleOrder(self.samples_per_epoch, seed)
        # a batch is in one, or ends in one and begins in the next
        self._buffer = functools.lru_cache(maxsize=2)(self._new_buffer)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The windows of the global samples `indices` (a range or a list of B numbers from 0): int64 [B, sequence_length + 1].

        The inputs are [:, :-1] and the targets [:, 1:]. UserError when a shard is damaged.
        """
        epochs, places = np.divmod(np.asarray(indices, np.int64), self.samples_per_epoch)
        buffers, places = np.divmod(places, self.order.buffer)
        rows = np.empty((len(places), self.sequence_length + 1), np.int64)
        left = np.arange(len(places))
        while len(left):
            epoch, number = int(epochs[left[0]]), int(buffers[left[0]])
            here = (epochs[left] == epoch) & (buffers[left] == number)
            buffer = self._buffer(epoch, number)
            rows[left[here]] = buffer.rows(places[left[here]])
            furthest, left = int(places[left[here]].max()), left[~here]
        if len(places):
            # the next one is read bit by bit, so that no batch has to wait for all of it
            self._buffer(*self._after(epoch, number)).read_share((furthest + 1) / self.order.buffer)
        return torch.from_numpy(rows)

    def epochs(self, samples: int) -> float:
        """How often the first `samples` samples go through the windows."""
        return samples / self.samples_per_epoch

    def _after(self, epoch: int, buffer: int) -> tuple[int, int]:
        last = (buffer + 1) * self.order.buffer >= self.samples_per_epoch
        return (epoch + 1, 0) if last else (epoch, buffer + 1)

    def _new_buffer(self, epoch: int, number: int) -> "_Buffer":
        places = np.arange(number * self.order.buffer, min((number + 1) * self.order.buffer, self.samples_per_epoch))
        return _Buffer(self.order.windows(np.full_like(places, epoch), places), self.order.block, self._read_block, self.sequence_length,
                       np.dtype(self.reader.manifest["dtype"]))

    def _read_block(self, block: int) -> np.ndarray:
        start = self._first + block * self.order.block * self.sequence_length
        return self.reader.read(start, min(start + self.order.block * self.sequence_length + 1, self._stop))


class _Buffer:
    """The windows that are permuted among themselves: the tokens of their blocks, each read when it is first needed."""

    def __init__(self, windows: np.ndarray, block: int, read: Callable[[int], np.ndarray], length: int, dtype: np.dtype):
        """windows: in their order. block: the windows of one; read(number) its tokens. length: T."""
        self._read = read
        self._blocks, self._slots = np.unique(windows // block, return_inverse=True)
        self._offsets = windows % block
        self._tokens = np.empty((len(self._blocks), block * length + 1), dtype)
        self._windows = sliding_window_view(self._tokens, length + 1, axis=1)[:, ::length]  # [blocks, block, T + 1]
        self._missing = set(range(len(self._blocks)))

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The windows at places [N], [N, T + 1] of the stored dtype."""
        slots = self._slots[places]
        if self._missing:
            self._fill(self._missing.intersection(slots.tolist()))
        return self._windows[slots, self._offsets[places]]

    def read_share(self, share: float) -> None:
        """Have at least so large a share of the blocks read, 0 to 1."""
        wanted = math.ceil(min(share, 1) * len(self._blocks))
        self._fill(sorted(self._missing)[:max(0, wanted - len(self._blocks) + len(self._missing))])

    def _fill(self, slots: Iterable[int]) -> None:
        for slot in slots:
            tokens = self._read(int(self._blocks[slot]))
            self._tokens[slot, :len(tokens)] = tokens
            self._missing.discard(slot)


def read_ahead(read: Callable[[int], Item], start: int, stop: int) -> Iterator[Item]:
    """read(start), read(start + 1) ... read(stop - 1), made by one background thread up to STEPS_AHEAD before they are asked for.

    A reader that meets a new buffer needs longer than a step of a small model, so one step ahead would not do. Errors come up where
    their item would have. Close the iterator to end the thread early.
    """
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting = deque(pool.submit(read, step) for step in range(start, min(start + STEPS_AHEAD, stop)))
        try:
            for step in range(start, stop):
                item = waiting.popleft().result()
                if step + STEPS_AHEAD < stop:
                    waiting.append(pool.submit(read, step + STEPS_AHEAD))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def rank_indices(step: int, global_batch: int, world_size: int, rank: int, micro_batch: int, groups: int = 1) -> list[range]:
    """The global samples that `rank` trains on in `step`: a range of `micro_batch` for each micro-step of gradient accumulation.

    Micro-step m of rank r takes the micro_batch samples from step * global_batch + (m * world_size + r) * micro_batch on;
    together all ranks and micro-steps take the step's global_batch samples once each. With `groups`, which must divide world_size, group
    g is the g-th equal part of the ranks and shares the g-th equal part of the step's samples in this way, whatever the number of ranks.
    UserError when the sizes do not divide.
    """
    if min(global_batch, world_size, micro_batch) < 1 or global_batch % (world_size * micro_batch):
        raise UserError(f"a global batch of {global_batch} cannot be shared by {world_size} ranks in micro-batches of "
                        f"{micro_batch}; make it a multiple of {world_size * micro_batch}")
    members, share = world_size // groups, global_batch // groups
    group, member = divmod(rank, members)
    first = step * global_batch + group * share
    return [range(start, start + micro_batch) for start in range(first + member * micro_batch, first + share, members * micro_batch)]


def count_windows(reader: ShardReader, sequence_length: int) -> int:
    """The windows of sequence_length + 1 tokens in shards. UserError when there is none."""
    return _count_windows(reader, sequence_length, len(reader))


def validation_windows(reader: ShardReader, sequence_length: int, count: int, first: int = 0) -> Tensor:
    """`count` windows in their order from window `first` on, or all there are when there are fewer, each once: int64 [N, T + 1].

    UserError when the shards hold fewer than T + 1 tokens, T being sequence_length.
    """
    stop = min(first + count, count_windows(reader, sequence_length))
    tokens = reader.read(first * sequence_length, stop * sequence_length + 1).astype(np.int64)
    return torch.from_numpy(tokens).unfold(0, sequence_length + 1, sequence_length).contiguous()


def _count_windows(reader: ShardReader, sequence_length: int, tokens: int) -> int:
    if tokens <= sequence_length:
        part = "" if tokens == len(reader) else " of one source"
        raise UserError(f"{reader.path} holds {tokens} tokens{part}, fewer than one window of {sequence_length} + 1; give more "
                        "text or a shorter sequence length")
    return (tokens - 1) // sequence_length


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Scatters 64-bit numbers: the output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _permute(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each place's image under a pseudo-random permutation of 0 .. size - 1 that its key picks; [N] each, places and sizes int64.

    A Feistel network permutes the numbers of an even number of bits, as few as hold `size` - 1. An image outside is permuted
    again until it falls inside (cycle walking), which is a permutation still. A place outside (-1 among 0) is its own image.
    """
    half_bits = ((np.frexp(np.maximum(sizes - 1, 1))[1] + 1) // 2).astype(np.uint64)
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    images = places.copy()
    walking = np.flatnonzero(places >= 0)
    while len(walking):
        bits, mask, key = half_bits[walking], half_mask[walking], keys[walking]
        numbers = images[walking].astype(np.uint64)
        left, right = numbers >> bits, numbers & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(number))) & mask)
        images[walking] = ((left << bits) | right).astype(np.int64)
        walking = walking[images[walking] >= sizes[walking]]
    return images
