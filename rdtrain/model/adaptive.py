"""Adaptive iterations: a token's chain ends when its distribution has settled, and its row leaves the computation.

For an ancestral chain whose posteriors are exact this costs no quality at any threshold: p(x | z_k) is then a martingale over the
iterations, so that a token drawn from it has the law of the prior wherever a rule that looks at the chain so far makes an end.
"""

import torch
from torch import Tensor

from .sampling import Sampling


class Exits:
    """Which rows of a batch have settled, after how many iterations, and with which logits; made anew for each token.

    rows: [R], those that go on. iterations: int64 [B], those that a row took, 0 while it goes on. logits: fp32 [B, V] of their last.
    """

    def __init__(self, sampling: Sampling, batch: int, vocabulary: int, device: torch.device):
        self._sampling = sampling
        self.rows = torch.arange(batch, device=device)
        self.iterations = torch.zeros(batch, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch, vocabulary, device=device)
        self._before: Tensor | None = None  # log-probabilities, or likeliest tokens, of the iteration before
        self._same: Tensor | None = None  # iterations in a row with this likeliest token

    def settled(self, logits: Tensor, iteration: int) -> Tensor:
        """bool [R] from the logits [R, V] of an iteration, from 0; called once for each."""
        kind, threshold = self._sampling.exit, self._sampling.exit_threshold
        if kind == "argmax":
            now = logits.argmax(-1)
            if self._same is None:
                self._before, self._same = now, torch.zeros_like(now)
            self._same = torch.where(now == self._before, self._same + 1, 1)
            self._before, settled = now, self._same >= threshold
        else:
            now = logits.float().log_softmax(-1)
            reference = 0 if kind == "entropy" else now if self._before is None else self._before
            change = (now - reference).masked_fill(now == -torch.inf, 0)  # of what was cut off, which would else make the sum NaN
            settled = (now.exp() * change).sum(-1).abs() < threshold
            if kind == "kl" and self._before is None:
                settled = torch.zeros_like(settled)
            self._before = now
        return settled & (iteration + 1 >= self._sampling.exit_minimum)

    def leave(self, which: Tensor, logits: Tensor, iteration: int) -> None:
        """Rows at these places [L] among those that go on end after this iteration, from 0, with logits [L, V]."""
        rows = self.rows[which]
        self.logits[rows], self.iterations[rows] = logits.float(), iteration + 1

    def keep(self, which: Tensor) -> None:
        """Go on with the rows at these places among those that do."""
        self.rows = self.rows[which]
        self._before = None if self._before is None else self._before[which]
        self._same = None if self._same is None else self._same[which]
