"""Sampling: how logits are sharpened and cut before they are used, in the chain and at its end, and which solver steps it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .solvers import SOLVERS, draw_tokens
from .text_random import TOKEN, PositionRandom

EXITS = {"never": None, "entropy": 0.05, "kl": 0.001, "argmax": 3.0}  # and the threshold that each has where none is set

@dataclass
class Sampling:
    """How a token is found.

    Of the last iteration's distribution, from which the token is drawn, in the order in which they apply:
    temperature: 0 is greedy.
    top_k: keep the k likeliest; 0 keeps all.
    top_p: keep the likeliest that make up this probability.
    min_p: keep those at least min_p times as likely as the likeliest; 0 keeps all.

    Of the iterations before it (a denoising model only):
    solver: euler, multistep or ancestral; see solvers.py.
    chain_temperature, chain_top_p: as temperature and top_p, of the distribution that an iteration hands to the solver: its expected
        embedding, or for ancestral its draw, is that of the sharpened distribution.
    chain_top_k: as top_k, of the same; 0 keeps all. The expected embedding of few tokens is quicker than that of all, for few texts at
        a time.
    chain_readout: where that distribution is read: `coda`, or `core` for a model with a core readout, which spares the coda.

    Of how many iterations a token takes, and what they keep (any model):
    exit: when a token's iterations end before the last: `never`; once the distribution's `entropy`, or its Kullback-Leibler divergence
        from that of the iteration before (`kl`), is below exit_threshold nats; or once the likeliest token (`argmax`) has been the same
        for exit_threshold iterations. None: 0.05, 0.001 and 3.
    exit_minimum: iterations that a token takes at least.
    caches: key-value caches that the K iterations share; 0 gives each its own, 1 keeps the last iteration's alone.
    cache_order: which iterations share one: `adjacent`, or `cyclic`, those that are the same modulo caches.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    solver: str = "euler"
    chain_temperature: float = 1.0
    chain_top_p: float = 1.0
    chain_readout: str = "coda"
    exit: str = "never"
    exit_threshold: float | None = None
    exit_minimum: int = 1
    caches: int = 0
    cache_order: str = "adjacent"
    chain_top_k: int = 0

    def __post_init__(self):
        """ValueError, in one sentence, for settings that leave nothing to draw from and for an unknown solver."""
        for name in ("temperature", "chain_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, and it is {getattr(self, name)}")
        for name in ("top_p", "chain_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], and it is {getattr(self, name)}")
        for name in ("top_k", "chain_top_k", "caches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, and it is {getattr(self, name)}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], and it is {self.min_p}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, and it is {self.solver}")
        if self.chain_readout not in ("coda", "core"):
            raise ValueError(f"chain_readout must be coda or core, and it is {self.chain_readout}")
        if self.exit not in EXITS:
            raise ValueError(f"exit must be one of {', '.join(EXITS)}, and it is {self.exit}")
        if self.exit_threshold is None:
            self.exit_threshold = EXITS[self.exit]
        elif self.exit == "never" or not 0 < self.exit_threshold < math.inf:
            raise ValueError(f"exit_threshold must be positive, with an exit that has one, and it is {self.exit_threshold}")
        if self.exit_minimum < 1:
            raise ValueError(f"exit_minimum must be at least 1, and it is {self.exit_minimum}")
        if self.cache_order not in ("adjacent", "cyclic"):
            raise ValueError(f"cache_order must be adjacent or cyclic, and it is {self.cache_order}")

    @property
    def changes_the_chain(self) -> bool:
        """Whether anything but the last iteration's draw is set: what means nothing to a model that is not a denoiser."""
        chain = (self.solver, self.chain_temperature, self.chain_top_p, self.chain_top_k, self.chain_readout)
        return chain != ("euler", 1, 1, 0, "coda")

    def chain_logits(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of an iteration before the last -> fp32 logits [..., V] for the solver."""
        return _top_p(_tempered(logits, self.chain_temperature), self.chain_top_p)

    def draw(self, logits: Tensor, random: PositionRandom) -> Tensor:
        """Tokens [B] from the last iteration's logits [B, V]; random: of the last position of each row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = _tempered(logits, self.temperature)
        if self.top_k:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        logits = _top_p(logits, self.top_p)
        if self.min_p:
            smallest = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        return draw_tokens(logits, random.exponential(TOKEN, logits.shape[-1]).squeeze(1))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """fp32 logits / temperature, less the largest; at 0 all but one of the largest are -inf."""
    logits = logits.float()
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    if temperature == 1:
        return logits
    # The largest stays 0 however low the temperature: 0 * 1e30 is 0, where 0 * inf would be nan.
    return (logits - logits.amax(-1, keepdim=True)) * min(1 / temperature, 1e30)


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits [..., V] with -inf for all but the likeliest that make up top_p."""
    if top_p == 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    # A token stays when those before it do not yet make up top_p: the likeliest always does.
    dropped = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)
