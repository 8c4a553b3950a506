"""What transformers' `generate` hands from token to token for this model: a chain, with its key-value cache and its noise.

It grows where it was not made large enough, goes back (`crop`), and takes other rows (beams). Its positions are those of all rows,
padding among them.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from .cache import KeyValueCache
from .chain import Chain
from .decoding import make_cache, make_chain
from .noise import NoiseSchedule
from .recurrent import RecurrentDepthLM, working_dtype
from .sampling import Sampling
from .text_random import TextRandom

SMALLEST = 64  # positions that there is room for at least


def check_kind(cache) -> None:
    """ValueError for a cache of transformers' own."""
    if not isinstance(cache, RecurrentDepthCache):
        raise ValueError(f"the cache must be a RecurrentDepthCache, and it is a {type(cache).__name__}: leave it out")


class RecurrentDepthCache(Cache):
    """Keys and values of each (iteration, layer). capacity: positions that there will be, where that is known."""

    is_compileable = False
    is_croppable = True
    is_linear = [False]  # of each layer: transformers reads a text anew, from 5.24 on, for a cache of which all are

    def __init__(self, capacity: int = 0):
        super().__init__(layers=[])
        self.capacity, self.iterations_used = capacity, None
        self._chain: Chain | None = None
        self._drawing: dict[str, float] = {}

    @property
    def started(self) -> bool:
        """Whether it belongs to a model and a batch."""
        return self._chain is not None

    def start(self, model: RecurrentDepthLM, noise: NoiseSchedule, iterations: int, sampling: Sampling, seeds: Tensor,
              padding: Tensor | None) -> None:
        """seeds: int64 [B]. padding: [B], columns at the left of each row that hold nothing. ValueError as `DenoisingChain` has it."""
        self._model, self._noise, self.iterations, self.sampling = model, noise, iterations, sampling
        self._make(seeds, padding, max(self.capacity, SMALLEST))

    @torch.compiler.disable  # of sizes that change from text to text, which compiled code makes symbols of
    @torch.inference_mode(False)  # or what is made in inference mode could not be written to outside of it
    @torch.no_grad()
    def _make(self, seeds: Tensor, padding: Tensor | None, capacity: int) -> None:
        model, sampling, iterations = self._model, self.sampling, self.iterations
        self._seeds, self.capacity = seeds.clone(), capacity
        weight = model.embedding.weight
        like = torch.empty(0, dtype=working_dtype(weight), device=weight.device)  # under autocast, keys are not of the weights' dtype
        self._cache = make_cache(model, iterations, sampling, len(seeds), capacity, like)
        self._cache.place.padding = padding
        self._make_chain()

    def _make_chain(self) -> None:
        sampling = replace(self.sampling, **self._drawing)
        self._chain = make_chain(self._model, self._noise, self.iterations, sampling, self._cache, TextRandom(self._seeds))
        self._chain.shapes_last = False

    def seed_with(self, seeds: Tensor) -> None:
        """Go on with these, int64 [B], for the noise of positions that are yet to come."""
        self._check_rows(len(seeds))
        self._seeds.copy_(seeds)

    def draw_with(self, **settings: float) -> None:
        """Sharpen and cut the prior of each iteration by these of a `Sampling`: temperature, top_k, top_p, min_p.

        The last iteration's is left to whoever draws from its logits.
        """
        if settings != self._drawing:
            self._drawing = settings
            if self.started:
                self._make_chain()

    @torch.no_grad()
    def _remake(self, rows: Tensor | None, capacity: int) -> None:
        """The same with other rows [B'] of it, or all, and another capacity."""
        before = self._cache
        padding, seeds = before.place.padding, self._seeds
        if rows is not None:
            padding, seeds = None if padding is None else padding[rows], seeds[rows]
        self._make(seeds, padding, capacity)
        for old, new in zip(_slots(before), _slots(self._cache)):
            for kind in ("keys", "values"):
                filled = getattr(old, kind)[:, :, : before.length]
                getattr(new, kind)[:, :, : before.length] = filled if rows is None else filled[rows]
        self._cache.place.move(before.length)

    def __deepcopy__(self, memo: dict) -> "RecurrentDepthCache":
        """One of its own for the same model, so that several texts can go on from one beginning."""
        other = copy(self)
        if self.started:
            other._remake(None, self.capacity)
        return other

    def check(self, model: RecurrentDepthLM, iterations: int | None, sampling: Sampling | None, batch: int) -> None:
        """ValueError when what is asked for, where something is, is not what it was started with."""
        if model is not self._model:
            raise ValueError("the cache was started with another model, whose keys and values mean nothing to this one: start a new one")
        if iterations not in (None, self.iterations) or sampling not in (None, self.sampling):
            raise ValueError(f"the cache was started with {self.iterations} iterations and {self.sampling}: ask for the same, or leave "
                             "out the cache")
        self._check_rows(batch)

    def _check_rows(self, batch: int) -> None:
        if batch != len(self._seeds):
            raise ValueError(f"the cache holds {len(self._seeds)} sequences, and {batch} were given: start a new one")

    def check_mask(self, mask: Tensor, new: int) -> None:
        """ValueError for a mask that is not of what it holds and so many new positions, or hides more than the padding it began with."""
        length, padding = self.get_seq_length() + new, self._cache.place.padding
        seen = torch.ones(len(self._seeds), length, dtype=torch.bool, device=mask.device)
        if padding is not None:
            seen = torch.arange(length, device=mask.device) >= padding.unsqueeze(1)
        if mask.shape != seen.shape or bool((seen & (mask == 0)).any()):
            raise ValueError(f"attention_mask must be {list(seen.shape)}, of what the cache holds and the {new} new ones, and hide nothing "
                             "but the padding that it began with: texts that ended apart go on in caches of their own")

    @torch.no_grad()
    def logits(self, ids: Tensor, observe: Callable[[Tensor, Tensor | None], None] | None) -> Tensor:
        """New tokens [B, n] -> logits [B, V] of the one after them, without gradient; observe: see `Chain`."""
        needed = self._cache.length + ids.shape[1]
        if needed > self.capacity:
            self._remake(None, max(needed, 2 * self.capacity))
        self._chain.observe = observe
        logits = self._chain(ids)
        self._chain.observe, self.iterations_used = None, self._chain.iterations_used
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that are filled, padding among them."""
        return self._cache.length if self.started else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    @property
    def bytes(self) -> int:
        """Of its keys and values."""
        return self._cache.bytes if self.started else 0

    def crop(self, tokens_to_remove: int) -> None:
        """crop(-n) forgets the last n positions of all rows. ValueError when there are not as many.

        As transformers' own caches have it: a positive number was once the length that stays, and is refused.
        """
        if not self.started and tokens_to_remove:
            raise ValueError("the cache is empty, and nothing can be cropped from it: leave crop out")
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) could mean two things: crop(-n) forgets the last n positions")
        if tokens_to_remove:
            self._cache.truncate(self.get_seq_length() + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put these rows [B] in the place of the ones that there are."""
        self._remake(beam_idx.to(self._seeds.device), self.capacity)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one copy after another."""
        self._remake(torch.arange(len(self._seeds), device=self._seeds.device).repeat_interleave(repeats), self.capacity)

    def reset(self) -> None:
        """Forget everything."""
        self._chain = None


def _slots(cache: KeyValueCache) -> list:
    return [slot for layers in (cache.prelude, *cache.core, *cache.coda) for slot in layers]
