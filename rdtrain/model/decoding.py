"""The decoder: a chain with its cache, for batches of one size, one after another or one turn after another.

Notable: on CUDA the step of one token (K iterations, and the draw) is captured as a CUDA graph, since launching its thousands of small
kernels from Python takes several times as long as running them. It reads and writes the same tensors each time, so one graph serves all
tokens, batches and turns; a cache of many columns has one for each number of columns that a step attends to (cache.py). An exit asks
the device at every iteration which rows go on, which no graph can.

A graph takes no time to start, but each of its kernels does, and at one text at a time most take no longer. `compiled` makes few of them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cache import KeyValueCache
from .chain import Chain, DenoisingChain, UnrolledChain
from .noise import NoiseSchedule
from .recurrent import MOST_ITERATIONS, RecurrentDepthLM
from .sampling import Sampling
from .text_random import TextRandom, row_seeds

STOP_INTERVAL = 16  # tokens after which it is asked whether all rows have ended: asking waits for the device


class CapturedStep:
    """A function of tensors that stay where they are, as a CUDA graph: a call replays it."""

    def __init__(self, step: Callable[[], None], pool=None):
        """step: does the same however often it runs; it runs once here. pool: of another graph, whose memory this one may use."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up in a first run, which a capture does not allow
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            step()

    def __call__(self) -> None:
        self.graph.replay()


def cache_bytes(model: RecurrentDepthLM, iterations: int, sampling: Sampling, capacity: int) -> int:
    """Bytes of the key-value cache of one row of so many positions."""
    like = torch.empty(0, dtype=model.embedding.weight.dtype, device="meta")
    return make_cache(model, iterations, sampling, 1, capacity, like).bytes


def make_cache(model: RecurrentDepthLM, iterations: int, sampling: Sampling, batch: int, capacity: int, like: Tensor) -> KeyValueCache:
    """An empty cache of so many rows and positions; `like` gives device and dtype."""
    coda_iterations = iterations if model.config.noise_conditioning and sampling.chain_readout == "coda" else 1
    return KeyValueCache(model.config, iterations, coda_iterations, batch, capacity, like, sampling.caches, sampling.cache_order)


def make_chain(model: RecurrentDepthLM, noise: NoiseSchedule, iterations: int, sampling: Sampling, cache: KeyValueCache | None,
               random: TextRandom) -> Chain:
    """The chain of a model of either kind. ValueError for settings that it cannot run with."""
    if model.config.noise_conditioning:
        return DenoisingChain(model, noise, iterations, sampling, cache, random)
    return UnrolledChain(model, iterations, sampling, cache, random)


class Decoder:
    """Generates with a model at one K and one sampling, keeping its past.

    batch, capacity: rows, and positions of each. cache: its key-value cache, or None. length: positions that are filled; the last token
    that was generated is not among them until it is handed in again, at the head of what follows. iterations_used: of each token
    since the last `generate`, int64 [B], where `exit` is set.
    """

    def __init__(self, model: RecurrentDepthLM, noise: NoiseSchedule, iterations: int, sampling: Sampling, batch: int, capacity: int,
                 use_cache: bool = True, capture: bool | None = None, compiled: bool = False):
        """capture: whether steps are captured; None: on CUDA, where it can be. compiled: whether their parts are compiled, at the first
        steps, in a third of a minute about. noise: unused by an unrolled model.

        ValueError, in one sentence, for K < 1 and for settings that the model cannot run with.
        """
        if not 1 <= iterations <= MOST_ITERATIONS:
            raise ValueError(f"generation needs at least one iteration and at most {MOST_ITERATIONS}, and was given {iterations}")
        device = model.embedding.weight.device
        self.model, self.sampling, self.batch, self.capacity, self.cache = model, sampling, batch, capacity, None
        if use_cache:
            self.cache = make_cache(model, iterations, sampling, batch, capacity, model.embedding.weight)
        can_capture = use_cache and device.type == "cuda" and sampling.exit == "never"
        if capture and not can_capture:
            raise ValueError("a step can be captured on CUDA, with a cache and without an exit: leave capture out, or change these")
        self._capture = can_capture if capture is None else capture
        self._seeds = torch.zeros(batch, dtype=torch.long, device=device)
        self._chain = make_chain(model, noise, iterations, sampling, self.cache, TextRandom(self._seeds))
        self._chain.compiled = compiled and use_cache
        self._steps: dict[int, CapturedStep] = {}
        self._ids = torch.zeros(batch, 1, dtype=torch.long, device=device)  # what a captured step reads
        self._chosen = torch.zeros(batch, dtype=torch.long, device=device)  # and writes
        self.iterations_used: list[Tensor] = []

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return 0 if self.cache is None else self.cache.length

    def truncate(self, length: int) -> None:
        """Go back to the first so many positions of all rows. ValueError when there are not as many."""
        self.cache.truncate(length)

    @torch.inference_mode()
    def generate(self, ids: Tensor, seeds: int | list[int], max_new_tokens: int, stop: int | None = None,
                 padding: list[int] | None = None) -> Iterator[Tensor]:
        """Yield the tokens [B] that follow ids [B, T >= 1], which follow what the cache holds, one position after another.

        seeds: of the rows' noise and sampling, see `row_seeds`. stop: a token after which a row has ended; the tokens that it still gets
        mean nothing, and no more come once all rows have. padding: the columns at the start of each row of ids that are to be ignored,
        when rows are of unequal length; the cache must be empty then.
        ValueError, in one sentence, for an empty prompt, a negative length, token ids out of range and more than the cache holds.
        """
        vocabulary, device = self.model.config.vocab_size, self._ids.device
        if ids.shape[1] < 1 or max_new_tokens < 0:
            raise ValueError(f"generation needs a prompt of at least one token and no negative length, and was given {ids.shape[1]} and "
                             f"{max_new_tokens}")
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {vocabulary}: encode with its own tokenizer")
        if self.cache is not None and self.length + ids.shape[1] + max_new_tokens - 1 > self.capacity:
            raise ValueError(f"the text has {self.length + ids.shape[1]} tokens, and with {max_new_tokens} more it is longer than the "
                             f"{self.capacity} that the cache holds: shorten it, ask for fewer, or make the cache larger")
        self._seeds.copy_(row_seeds(seeds, self.batch))
        if padding is not None or self.length == 0:
            self._pad(padding)
        self.iterations_used, ended = [], None
        ids = ids.to(device)
        for number in range(1, max_new_tokens + 1):
            chosen = self._next(ids)
            yield chosen
            ids = chosen.unsqueeze(1)
            if stop is not None:
                ended = chosen == stop if ended is None else ended | (chosen == stop)
                if number % STOP_INTERVAL == 0 and bool(ended.all()):
                    return

    def _pad(self, padding: list[int] | None) -> None:
        padded = self.cache is not None and self.cache.place.padding is not None
        if padding is None or not any(padding):
            if padded:  # it stays, as zeros: captured steps read it
                self.cache.place.padding.zero_()
            return
        if self.cache is None or self.length:
            raise ValueError("rows of unequal length need an empty key-value cache: use one, and start it anew")
        widths = torch.tensor(padding).to(self._ids.device)
        if padded:
            self.cache.place.padding.copy_(widths)
        else:
            self.cache.place.padding, self._steps = widths, {}

    def _next(self, ids: Tensor) -> Tensor:
        if self._capture and ids.shape[1] == 1:
            self._ids.copy_(ids)
            view = self.cache.place.view
            if view not in self._steps:
                pool = next(iter(self._steps.values())).graph.pool() if self._steps else None
                self._steps[view] = CapturedStep(self._step, pool)
            self._steps[view]()
            self.cache.place.count = 1  # what the replay cannot say
            self.cache.advance()
            return self._chosen.clone()
        chosen = self._chain.draw(self._chain(ids))
        if self._chain.iterations_used is not None:
            self.iterations_used.append(self._chain.iterations_used)
        elif self.sampling.exit != "never":
            self.iterations_used.append(torch.full_like(chosen, self._chain.iterations))
        return chosen

    def _step(self) -> None:
        self._chosen.copy_(self._chain.draw(self._chain.logits(self._ids)))
