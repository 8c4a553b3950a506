"""From tokens to the logits of the next one by K iterations, with or without a key-value cache.

For a denoising model (arXiv 2506.14202) a new position starts as pure noise and is denoised by a solver over K falling levels; the last
iteration's logits give the token. A position of the prompt, whose next token is known, enters iteration k as that token's embedding
noised to level k, all positions in one pass. For an unrolled model a position starts from a random state (or zeros, as its
config says) and the core runs K times (Huginn, arXiv 2502.05171).

The cache keeps, for each (iteration, layer), keys and values as they were computed while the token was made. Without a cache the
same states are kept and everything else is computed anew at each token: slow, and a check on the cache. What is drawn is a function of
a text's seed and the position, the same either way and in any batch. What does not depend on the token is computed once, in the
constructor. Nothing here waits for the device, but for `exit`, which must ask it which rows go on.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .adaptive import Exits
from .cache import CacheSlot, KeyValueCache
from .compiled import compiled_part, is_sum
from .denoiser import NoiseLevel, denoise_at
from .noise import NoiseSchedule
from .recurrent import ModelConfig, RecurrentDepthLM, initial_state
from .sampling import Sampling
from .solvers import SOLVERS, expected_target
from .text_random import STATE, TextRandom


class Chain:
    """What both kinds share. Call it with the prompt, then with each chosen token.

    random: of the last position, after a call. iterations_used: int64 [B] of the last call, or None where all K
    ran: without an exit, and over a prompt: more than one new position, or the first. observe: called, where it is set, with the states of
    a call: of a denoising model at each iteration the last position's, [B, 1, d], and the logits [B, 1, V] of that iteration; of another
    the new positions' before the first iteration and after each, [B, n, d], and None. shapes_last: whether the prior of the last
    iteration is sharpened and cut as those before it; who samples from its logits himself sets it to False. (At temperature 0 there is
    nothing to draw: the logits are then the last iteration's prior.)
    """

    def __init__(self, model: RecurrentDepthLM, iterations: int, sampling: Sampling, cache: KeyValueCache | None, random: TextRandom):
        """ValueError for adaptive iterations and shared caches without a cache."""
        if cache is None and (sampling.exit != "never" or sampling.caches):
            raise ValueError("exit and caches need the key-value cache: leave them out, or use it")
        self._model, self.iterations, self._sampling, self._cache, self._random = model, iterations, sampling, cache, random
        self._ids: Tensor | None = None  # without a cache: all tokens so far
        self._length = 0
        self._used = model.config.vocab_size - model.config.unused_tokens
        self._shapes_priors, self.shapes_last = False, True
        self.random = self.iterations_used = None
        self.observe: Callable[[Tensor, Tensor | None], None] | None = None
        self.compiled = False

    def __call__(self, ids: Tensor) -> Tensor:
        """New tokens [B, n], the next token of the last one being sought -> logits [B, V]."""
        logits = self.logits(ids)
        if self._cache is not None:
            self._cache.advance()
        self._length += ids.shape[1]
        return logits

    def logits(self, ids: Tensor) -> Tensor:
        """The same, but that the cache stays where it is: to be called again, or followed by its `advance`."""
        raise NotImplementedError

    def _part(self, part: Callable) -> Callable:
        """A function of the pass that is under way, compiled or as it is."""
        return compiled_part(part) if self.compiled and self._cache.place.one_position else part

    def draw(self, logits: Tensor) -> Tensor:
        """Tokens [B] from what the last call gave; never one of the model's unused tokens."""
        return self._sampling.draw(logits[..., : self._used], self.random, self._shapes_priors)

    def _shape(self, logits: Tensor) -> Tensor:
        """The sampling's `shape` of all tokens but the unused ones, which get -inf."""
        shaped = self._sampling.shape(logits[..., : self._used])
        unused = logits.shape[-1] - self._used
        return F.pad(shaped, (0, unused), value=-torch.inf) if unused else shaped

    def _begin(self, ids: Tensor):
        """The random numbers of the new positions."""
        if self._cache is not None:
            self._cache.place.begin(self._model.rotary, ids.shape[1])
            positions = self._cache.place.positions
        else:
            self._ids = _append(self._ids, ids)
            positions = torch.arange(self._length, self._length + ids.shape[1], device=ids.device).unsqueeze(0)
        random = self._random.at(positions)
        self.random = random.last()
        return random

    def _exits(self, ids: Tensor) -> Exits | None:
        if self._sampling.exit == "never" or ids.shape[1] > 1 or not self._cache.length:  # a prompt, also of one token
            return None
        return Exits(self._sampling, ids.shape[0], self._model.config.vocab_size, ids.device)

    def _end(self, exits: Exits | None, logits: Tensor) -> Tensor:
        self.iterations_used = None
        if exits is None:
            return logits
        self._cache.share_last(exits.iterations - 1)
        self.iterations_used = exits.iterations
        return exits.logits


def iterate_and_read(model: RecurrentDepthLM, z: Tensor, e: Tensor, level: NoiseLevel, sigma_data: float, core: list[CacheSlot] | None,
                     coda: list[CacheSlot] | None, through_coda: bool, previous: Tensor | None,
                     block: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """`denoise_at`, and what the logits are read from, [B, n, d]: the coda's output, or the core's state."""
    state, evidence = denoise_at(model, z, e, level, sigma_data, core, previous, block)
    return state, evidence, model.coda(state, level.of_coda, coda) if through_coda else state


def check_sampling(config: ModelConfig, sampling: Sampling) -> None:
    """ValueError for a denoising chain that reads from the core when the model has no core readout."""
    if config.noise_conditioning and sampling.chain_readout == "core" and not config.core_readout:
        raise ValueError("chain_readout=core needs a model that was trained with objective.core_readout=true: leave it at coda")


class DenoisingChain(Chain):
    """Next-token logits of a denoising model."""

    def __init__(self, model: RecurrentDepthLM, noise: NoiseSchedule, iterations: int, sampling: Sampling,
                 cache: KeyValueCache | None, random: TextRandom):
        """ValueError for a chain that reads from the core when the model has no core readout."""
        super().__init__(model, iterations, sampling, cache, random)
        check_sampling(model.config, sampling)
        levels = noise.levels(iterations)
        self._sigma_data = noise.sigma_data(model.config.width)
        self._shapes_priors = model.config.posterior_readout
        self._steps = list(zip(levels, levels[1:]))
        weight = model.embedding.weight
        with torch.no_grad():
            at = [NoiseLevel.at(model, torch.full((1, 1), sigma, device=weight.device), self._sigma_data) for sigma in levels[:-1]]
            self._levels = [level.of_layers(model, model.config.block_of(k, iterations)) for k, level in enumerate(at)]
            self._targets = model.unit_embeddings().to(weight.dtype)  # all are read in each iteration
            if is_sum(1, self._targets):  # a channel after another, as compiled code sums them
                self._targets = self._targets.t().contiguous().t()
        self._inverse_lengths = model.inverse_lengths() if model.config.posterior_readout else None
        self._states: list[Tensor | None] = [None] * iterations  # without a cache

    def logits(self, ids: Tensor) -> Tensor:
        """New tokens [B, n] -> logits [B, V] of the one after them."""
        model, cache = self._model, self._cache
        random = self._begin(ids)
        eps = random.normal(STATE, model.config.width)
        known = self._targets[ids[:, 1:]]
        e = self._part(RecurrentDepthLM.prelude)(model, ids if cache is not None else self._ids, cache and cache.prelude)
        z = self._steps[0][0] * eps[:, -1:]
        solver = SOLVERS[self._sampling.solver](self._targets, self.random, self._sampling.chain_top_k)
        solver.mean = self._part(expected_target)
        exits, previous, from_core = self._exits(ids), None, self._sampling.chain_readout == "core"
        for k, (sigma, sigma_next) in enumerate(self._steps):
            state = torch.cat((known + sigma * eps[:, :-1], z), dim=1) if known.shape[1] else z
            if cache is None:
                state = self._states[k] = _append(self._states[k], state)
            block, last = model.config.block_of(k, self.iterations), k + 1 == self.iterations
            state, evidence, read = self._part(iterate_and_read)(
                model, state, e, self._levels[k], self._sigma_data, cache and cache.core[k], self._coda_slots(k),
                last or not from_core, previous, block,
            )
            logits = self._read(read, evidence, k, last)
            if self.observe is not None:
                self.observe(z, logits)
            if exits is not None:
                gone = torch.ones_like(exits.rows, dtype=torch.bool) if last else exits.settled(logits[:, 0], k)
                if gone.any():
                    which, stay = gone.nonzero().squeeze(1), gone.logical_not().nonzero().squeeze(1)
                    exits.leave(which, self._final(state, read, evidence, logits, exits.rows, which, k, last), k)
                    exits.keep(stay)
                    if not len(stay):
                        break
                    cache.place.keep(exits.rows)
                    solver.keep(stay)
                    state, evidence, logits, z, e = (None if one is None else one[stay] for one in (state, evidence, logits, z, e))
                    known, read = known[stay], read[stay]
            if not last:
                if model.config.self_conditioning:  # every position is told, as in training
                    previous = model.expected_embedding(self._logits(read, evidence, k, False, False), self._targets)
                z = solver.step(z, self._sampling.chain_logits(logits), sigma, sigma_next)
        return self._end(exits, logits[:, 0])

    def _coda_slots(self, k: int) -> list[CacheSlot] | None:
        return self._cache and self._cache.coda[0 if self._sampling.chain_readout == "core" else k]

    def _read(self, hidden: Tensor, evidence: Tensor | None, k: int, last: bool) -> Tensor:
        """Logits [B, 1, V] of the last position of what an iteration's logits are read from, [B, n, d]."""
        greedy = last and self._sampling.temperature == 0  # the prior's mode, not what the noise makes of it
        shaped = self._shapes_priors and not greedy and (self.shapes_last or not last)
        return self._logits(hidden[:, -1:], None if evidence is None or greedy else evidence[:, -1:], k, last, shaped)

    def _logits(self, hidden: Tensor, evidence: Tensor | None, k: int, last: bool, shaped: bool) -> Tensor:
        from_core = self._sampling.chain_readout == "core" and not last
        read = self._part(RecurrentDepthLM.readout_from_core if from_core else RecurrentDepthLM.head)
        return read(self._model, hidden, evidence, self._inverse_lengths, self._shape if shaped else None)

    def _final(self, state: Tensor, read: Tensor, evidence: Tensor | None, logits: Tensor, rows: Tensor, which: Tensor, k: int,
               last: bool) -> Tensor:
        """Logits [L, V] of the rows that leave, as the last iteration has them.

        They are there but where the chain is read from the core, as the coda has not run yet, and where the last prior is left as it is.
        """
        from_core = self._sampling.chain_readout == "core"
        if last or not from_core and (self.shapes_last or not self._shapes_priors):
            return logits[which, 0]
        hidden = read[which]
        if from_core:
            self._cache.place.keep(rows[which])
            hidden = self._model.coda(state[which], self._levels[k].of_coda, self._coda_slots(k))
        return self._read(hidden, evidence if evidence is None else evidence[which], k, True)[:, 0]


class UnrolledChain(Chain):
    """Next-token logits of a model that is not a denoiser: bptt's or one_pass's."""

    def __init__(self, model: RecurrentDepthLM, iterations: int, sampling: Sampling, cache: KeyValueCache | None, random: TextRandom):
        """Of the sampling, exit and caches bear on it; with an exit, the coda runs at every iteration."""
        super().__init__(model, iterations, sampling, cache, random)
        self._start: Tensor | None = None  # without a cache

    def logits(self, ids: Tensor) -> Tensor:
        """New tokens [B, n] -> logits [B, V] of the one after them."""
        model, cache = self._model, self._cache
        random = self._begin(ids)
        if model.config.initial_state == "zero":
            state = torch.zeros(*ids.shape, model.config.width, device=ids.device)
        else:
            state = initial_state(random.uniform(STATE, model.config.width))
        if cache is None:
            state = self._start = _append(self._start, state)
        e = self._part(RecurrentDepthLM.prelude)(model, ids if cache is not None else self._ids, cache and cache.prelude)
        exits, slots = self._exits(ids), cache and cache.coda[0]
        for k in range(self.iterations):
            if self.observe is not None:
                self.observe(state, None)
            state = self._part(RecurrentDepthLM.iterate)(model, state, e, None, cache and cache.core[k])
            last = k + 1 == self.iterations
            if exits is None and not last:
                continue
            hidden = self._part(RecurrentDepthLM.coda)(model, state, None, slots)
            logits = self._part(RecurrentDepthLM.head)(model, hidden[:, -1])
            if exits is not None:
                gone = torch.ones_like(exits.rows, dtype=torch.bool) if last else exits.settled(logits, k)
                if gone.any():
                    which, stay = gone.nonzero().squeeze(1), gone.logical_not().nonzero().squeeze(1)
                    exits.leave(which, logits[which], k)
                    exits.keep(stay)
                    if not len(stay):
                        break
                    cache.place.keep(exits.rows)
                    state, e = state[stay], e[stay]
        if self.observe is not None:
            self.observe(state, None)
        return self._end(exits, logits)


def _append(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=1)
