"""From tokens to the logits of the next one by K iterations, with or without a key-value cache.

For a denoising model (arXiv 2506.14202) a new position starts as pure noise and is denoised by a solver over K falling levels; the last
iteration's logits give the token. A position of the prompt, whose next token is known, enters iteration k as that token's embedding
noised to level k, all positions in one pass. For an unrolled model a position starts from a random state (or zeros, as its
config says) and the core runs K times (Huginn, arXiv 2502.05171).

The cache keeps, for each (iteration, layer), keys and values as they were computed while the token was made. Without a cache the
same states are kept and everything else is computed anew at each token: slow, and a check on the cache. What is drawn, and in which
order, is the same either way. Nothing here waits for the device.
"""

import torch
from torch import Tensor

from .cache import KeyValueCache
from .denoiser import denoise_state
from .noise import NoiseSchedule
from .recurrent import RecurrentDepthLM, initial_state
from .sampling import Sampling
from .solvers import SOLVERS


class DenoisingChain:
    """Next-token logits of a denoising model. Call it with the prompt, then with each chosen token."""

    def __init__(self, model: RecurrentDepthLM, noise: NoiseSchedule, iterations: int, sampling: Sampling,
                 cache: KeyValueCache | None, generator: torch.Generator):
        """ValueError for a chain that reads from the core when the model has no core readout."""
        if sampling.chain_readout == "core" and not model.config.core_readout:
            raise ValueError("chain_readout=core needs a model that was trained with objective.core_readout=true: leave it at coda")
        levels = noise.levels(iterations)
        self._sigma_data = noise.sigma_data(model.config.width)
        self._steps = list(zip(levels, levels[1:]))
        self._model, self._sampling, self._cache, self._generator = model, sampling, cache, generator
        self._unit_embeddings = model.unit_embeddings()
        self._ids: Tensor | None = None  # without a cache: all tokens so far, and the states of each iteration
        self._states: list[Tensor | None] = [None] * iterations

    def __call__(self, ids: Tensor) -> Tensor:
        """New tokens [B, n], the next token of the last one being sought -> logits [B, V]."""
        model, cache = self._model, self._cache
        eps = torch.randn(*ids.shape, model.config.width, generator=self._generator, device=ids.device)
        known = self._unit_embeddings[ids[:, 1:]]
        if cache is None:
            ids = self._ids = _append(self._ids, ids)
        e = model.prelude(ids, cache and cache.prelude)
        z = self._steps[0][0] * eps[:, -1:]
        solver = SOLVERS[self._sampling.solver](self._unit_embeddings, self._generator)
        previous = None
        for k, (sigma, sigma_next) in enumerate(self._steps):
            state = torch.cat((known + sigma * eps[:, :-1], z), dim=1)
            if cache is None:
                state = self._states[k] = _append(self._states[k], state)
            level = torch.full((ids.shape[0], 1), sigma, device=ids.device)
            block = model.config.block_of(k, len(self._steps))
            state, conditioning, evidence = denoise_state(
                model, state, e, level, self._sigma_data, cache and cache.core[k], previous, block
            )
            last, from_core = k + 1 == len(self._steps), self._sampling.chain_readout == "core"
            if from_core and not last:
                read = model.readout_from_core
            else:
                slots = cache and cache.coda[0 if from_core else k]
                state, read = model.coda(state, conditioning, slots), model.head
            logits = read(state[:, -1:], evidence if evidence is None else evidence[:, -1:])
            if not last:
                if model.config.self_conditioning:  # every position is told, as in training
                    previous = read(state, evidence).float().softmax(-1) @ self._unit_embeddings
                z = solver.step(z, self._sampling.chain_logits(logits), sigma, sigma_next)
        return logits[:, 0]


class UnrolledChain:
    """Next-token logits of a model that is not a denoiser: bptt's or one_pass's; called like DenoisingChain."""

    def __init__(self, model: RecurrentDepthLM, iterations: int, cache: KeyValueCache | None, generator: torch.Generator):
        self._model, self._iterations, self._cache, self._generator = model, iterations, cache, generator
        self._ids: Tensor | None = None
        self._start: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """New tokens [B, n] -> logits [B, V] of the one after them."""
        model, cache = self._model, self._cache
        shape = (*ids.shape, model.config.width)
        if model.config.initial_state == "zero":
            state = torch.zeros(shape, device=ids.device)
        else:
            uniform = torch.rand(shape, generator=self._generator, device=ids.device)
            state = initial_state(uniform.clamp(min=2**-25))
        if cache is None:
            ids = self._ids = _append(self._ids, ids)
            state = self._start = _append(self._start, state)
        e = model.prelude(ids, cache and cache.prelude)
        for k in range(self._iterations):
            state = model.iterate(state, e, None, cache and cache.core[k])
        return model.head(model.coda(state, None, cache and cache.coda[0])[:, -1])


def _append(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=1)
