"""Samples drawn from several sources by weights: which source a sample is of, and which of its windows, is arithmetic on its number.

A run's samples are counted in blocks of 64. How many of the first n samples are of a source, n being a multiple of 64, follows from n and
the weights (`Quotas`), so a block has a fixed number of samples of each source; their order in it is permuted by the seed. Sample number
k of a source is place k % windows of epoch k // windows in the source's own `SampleOrder`.

Notable: weights may change while a run goes on. A phase is the samples from one number on that are drawn with one set of weights; its
blocks begin with it, and each source goes on after what has been drawn of it. The list of phases is the only state, in every checkpoint.
"""

import functools
import hashlib
import heapq
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .loader import Loader, SampleOrder
from .rows import DocumentRows
from .shards import ShardReader

BLOCK = 64  # samples with fixed numbers of each source
STRETCH = 16 * BLOCK  # samples that are worked out at once


class Quotas:
    """How many of the first n samples are of each source: whole numbers that sum to n and never fall as n grows, in O(sources).

    Of two sources, one with the part w of their weight gets n w, rounded, and the other the rest. Of more, groups share likewise, and
    what a group gets its own two parts share. The groups are those of Huffman (1952): the two lightest are put together first, so that a
    group of several has at most 2/3 of the one that it is in. A division is off by 1/2 at most, and hands on its own error times the
    part; so no source is off n times its weight by 2 or more, and of two sources by more than 1/2.
    """

    def __init__(self, weights: Sequence[float]):
        """weights: of each source, 0 or more, and one of them above 0; only their ratios matter, as the decimals they are written in."""
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        number = itertools.count()  # of equal weights the older comes first
        heap = [(int(weight * scale), next(number), source) for source, weight in enumerate(exact) if weight]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (light[0] + heavy[0], next(number), (light, heavy)))
        self._sources, self._whole = len(exact), heap[0]

    def counts(self, samples: int) -> list[int]:
        """Of the first `samples` samples, those of each source."""
        counts, waiting = [0] * self._sources, [(self._whole, samples)]
        while waiting:
            (weight, _, parts), count = waiting.pop()
            if isinstance(parts, int):
                counts[parts] = count
            else:
                share = (2 * count * parts[0][0] + weight) // (2 * weight)
                waiting += [(parts[0], share), (parts[1], count - share)]
        return counts


class Mixture:
    """Which sample of which source each sample of a run is.

    Attributes: names, of all sources that have or had a weight, sorted; phases, in their order, each a dictionary of `first_sample` and
    `weights`, the weight of each source by its name.
    """

    def __init__(self, weights: dict[str, float], seed: int):
        """weights: of each source, as `Quotas` takes them. seed: of the order in a block."""
        self._weights = dict(weights)
        self._order = SampleOrder(BLOCK, seed, block=1, buffer_blocks=BLOCK)
        self.continue_from([], 0)

    def continue_from(self, phases: list[dict], sample: int) -> None:
        """Go on as a checkpoint with these phases would. Where its weights are others, this mixture's hold from `sample` on."""
        phases = list(phases)
        if not phases or phases[-1]["weights"] != self._weights:
            phases = [phase for phase in phases if phase["first_sample"] < sample]
            phases.append({"first_sample": sample if phases else 0, "weights": self._weights})
        self.phases = phases
        self.names = sorted({name for phase in phases for name in phase["weights"]})
        self._firsts = np.array([phase["first_sample"] for phase in phases])
        self._quotas = [Quotas([phase["weights"].get(name, 0) for name in self.names]) for phase in phases]
        self._stretch = functools.lru_cache(maxsize=4)(self._new_stretch)
        self._drawn_before = [np.zeros(len(self.names), np.int64)]  # the first phase, and then each of the others
        for first in self._firsts[1:].tolist():
            self._drawn_before.append(self._drawn(len(self._drawn_before) - 1, first))

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples are of each source."""
        phase = int(np.searchsorted(self._firsts, samples, "right")) - 1
        return dict(zip(self.names, self._drawn(phase, samples).tolist()))

    def places(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of the samples `indices` [N], as its number in `names`, and the sample's number in it; int64 [N] both."""
        indices = np.asarray(indices, np.int64)
        phases = np.searchsorted(self._firsts, indices, "right") - 1
        stretches, places = np.divmod(indices - self._firsts[phases], STRETCH)
        sources, numbers = np.empty_like(indices), np.empty_like(indices)
        for phase, stretch in set(zip(phases.tolist(), stretches.tolist())):
            here = (phases == phase) & (stretches == stretch)
            sources[here], numbers[here] = (found[places[here]] for found in self._stretch(phase, stretch))
        return sources, numbers

    def _drawn(self, phase: int, samples: int) -> np.ndarray:
        """Of the first `samples` samples, which end in `phase`, those of each source."""
        stretch, place = divmod(samples - int(self._firsts[phase]), STRETCH)
        before = self._drawn_before[phase] + np.array(self._quotas[phase].counts(stretch * STRETCH))
        return before + np.bincount(self._stretch(phase, stretch)[0][:place], minlength=len(self.names))

    def _new_stretch(self, phase: int, stretch: int) -> tuple[np.ndarray, np.ndarray]:
        """The source and the number in it of each sample of a stretch, int64 [STRETCH] both."""
        start = stretch * STRETCH
        counts = np.array([self._quotas[phase].counts(samples) for samples in range(start, start + STRETCH + 1, BLOCK)])
        blocks = np.stack([np.repeat(np.arange(len(self.names)), more) for more in np.diff(counts, axis=0)])
        firsts = np.repeat(self._firsts[phase] + np.arange(start, start + STRETCH, BLOCK), BLOCK)
        places = self._order.windows(firsts, np.tile(np.arange(BLOCK), STRETCH // BLOCK)).reshape(-1, BLOCK)
        sources = np.take_along_axis(blocks, places, axis=1).ravel()
        numbers = np.empty_like(sources)
        for source, first in enumerate(self._drawn_before[phase] + counts[0]):
            here = np.flatnonzero(sources == source)
            numbers[here] = first + np.arange(len(here))
        return sources, numbers


class MixtureLoader:
    """Batches of windows of several sources, drawn by a `Mixture`, each source in an order of its own.

    Attributes: reader (of the first folder, for its tokenizer), sequence_length, samples_per_epoch (windows of each source), mixture.
    """

    def __init__(self, loaders: dict[str, Loader], mixture: Mixture):
        """loaders: of each source by its name; each with a weight above 0 in `mixture` needs one."""
        first = next(iter(loaders.values()))
        self.reader, self.sequence_length, self.mixture = first.reader, first.sequence_length, mixture
        self.samples_per_epoch = {name: loader.samples_per_epoch for name, loader in loaders.items()}
        self._loaders = loaders

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The windows of the global samples `indices`, B numbers from 0: int64 [B, sequence_length + 1]. UserError for a damaged shard."""
        sources, numbers = self.mixture.places(indices)
        rows = torch.empty(len(sources), self.sequence_length + 1, dtype=torch.int64)
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            rows[torch.from_numpy(here)] = self._loaders[self.mixture.names[source]].batch(numbers[here])
        return rows

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples go through each source."""
        drawn = self.mixture.drawn(samples)
        return {name: drawn[name] / windows for name, windows in self.samples_per_epoch.items()}


def open_loader(train: str | dict[str, str], mixture: dict[str, float], rows: str, sequence_length: int,
                seed: int) -> Loader | MixtureLoader | DocumentRows:
    """The loader of a run. train: a folder of shards, or several by their names; mixture: the weights of sources, or none for one stream;
    rows: `packed` or `documents`, of one stream.

    UserError when folders are of different tokenizers, a weight is of no source, or a source is shorter than a window.
    """
    folders = {"": train} if isinstance(train, str) else train
    readers: dict[str, ShardReader] = {}
    for name, folder in folders.items():
        tokenizer_hash = next(iter(readers.values())).manifest["tokenizer_hash"] if readers else None
        readers[name] = ShardReader(folder, tokenizer_hash=tokenizer_hash)
    if not mixture:
        return (DocumentRows if rows == "documents" else Loader)(readers[""], sequence_length, seed)
    ranges = {name: (reader, 0, len(reader)) for name, reader in readers.items() if name}
    for name, reader in readers.items():
        for source in reader.manifest["sources"] if reader.manifest["format_version"] > 1 else ():  # version 1 names none
            ranges[f"{name}/{source['name']}" if name else source["name"]] = (reader, source["first_token"], source["tokens"])
    loaders = {}
    for name, weight in mixture.items():
        if name not in ranges:
            raise UserError(f"data.mixture gives a weight to '{name}', and there is no such source: name some of "
                            f"{', '.join(ranges) or 'the sources that newly written shards would have'}")
        if weight > 0:
            reader, first, tokens = ranges[name]
            loaders[name] = Loader(reader, sequence_length, _seed(seed, name), first, tokens)
    return MixtureLoader(loaders, Mixture(mixture, _seed(seed, "")))


def _seed(seed: int, name: str) -> int:
    """A seed for each source, so that sources of the same size come in different orders, whatever others there are."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
