"""Sampling: how logits are sharpened and cut before they are used, in the chain and at its end, and which solver steps it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .solvers import SOLVERS, draw_tokens


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
    chain_readout: where that distribution is read: `coda`, or `core` for a model with a core readout, which spares the coda.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    solver: str = "euler"
    chain_temperature: float = 1.0
    chain_top_p: float = 1.0
    chain_readout: str = "coda"

    def __post_init__(self):
        """ValueError, in one sentence, for settings that leave nothing to draw from and for an unknown solver."""
        for name in ("temperature", "chain_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, and it is {getattr(self, name)}")
        for name in ("top_p", "chain_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], and it is {getattr(self, name)}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, and it is {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], and it is {self.min_p}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, and it is {self.solver}")
        if self.chain_readout not in ("coda", "core"):
            raise ValueError(f"chain_readout must be coda or core, and it is {self.chain_readout}")

    @property
    def changes_the_chain(self) -> bool:
        """Whether anything but the last iteration's draw is set: what means nothing to a model that is not a denoiser."""
        return (self.solver, self.chain_temperature, self.chain_top_p, self.chain_readout) != ("euler", 1, 1, "coda")

    def chain_logits(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of an iteration before the last -> fp32 logits [..., V] for the solver."""
        return _top_p(_tempered(logits, self.chain_temperature), self.chain_top_p)

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [...] from the last iteration's logits [..., V]."""
        logits = _tempered(logits, self.temperature)
        if self.top_k:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        logits = _top_p(logits, self.top_p)
        if self.min_p:
            smallest = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        return draw_tokens(logits, generator)


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
