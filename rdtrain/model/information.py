"""How much of a token is still unknown at each noise level: the model's cross-entropy against sigma, learned while it trains.

The curve rises from 0, where the noised target gives the token away, to the cross-entropy of pure noise. Dieleman et al. 2022
(CDCD, arXiv 2211.15089) learn it to draw noise levels from; here it also divides the levels into iterations that each remove the
same number of nats. Observations are added up as whole numbers, whose sum is the same in every order: the curve depends on the data
seen, and neither on how ranks share it nor on where a run was interrupted.
"""

import math
from bisect import bisect_left
from statistics import NormalDist

import torch
from torch import Tensor

LEVELS = 64
"""Points of the curve, evenly spaced in ln(sigma), the two ends among them."""

TILT = 0.01
"""Nats per unit of ln(sigma) that are added before the curve is inverted: it is flat where nothing is left to learn, and everywhere
in a model that has learned nothing, whose levels are so divided evenly."""

DECAY = 0.9
"""What remains of earlier observations at each fold."""

UNIT = 2.0**-20
"""Nats and tokens: the unit in which observations are counted."""


class InformationCurve:
    """A non-decreasing cross-entropy against noise level, linear in ln(sigma) between its LEVELS points."""

    def __init__(self, sigma_min: float, sigma_max: float, cross_entropy: list[float]):
        """cross_entropy: nats at the LEVELS points from sigma_min to sigma_max. ValueError for another number of them."""
        if len(cross_entropy) != LEVELS:
            raise ValueError(f"an information curve has {LEVELS} points, and this one has {len(cross_entropy)}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.cross_entropy = cross_entropy
        self._log_sigma = _log_levels(sigma_min, sigma_max)
        self._tilted = [nats + TILT * (x - self._log_sigma[0]) for nats, x in zip(cross_entropy, self._log_sigma)]

    @classmethod
    def expected(cls, sigma_min: float, sigma_max: float) -> "InformationCurve":
        """What to expect before anything is measured: ln V * Phi((ln sigma - ln sigma_c) / 0.5), at V = 8192.

        Among V targets of length one, the right one stands out below the critical noise sigma_c = 1 / sqrt(2 ln V), whatever their
        dimension: there the likeliest of the others, at sqrt(2 ln V) standard deviations, is as near. It hardly depends on V
        (0.26 for 2,048 and 0.21 for 65,536), and only the curve's shape matters. The width 0.5 is a measured one, at d = 512.
        """
        entropy = math.log(8192)
        normal = NormalDist(-0.5 * math.log(2 * entropy), 0.5)
        return cls(sigma_min, sigma_max, [entropy * normal.cdf(x) for x in _log_levels(sigma_min, sigma_max)])

    def at(self, sigma: float) -> float:
        """Cross-entropy in nats at a noise level, constant beyond the ends."""
        return _interpolate(math.log(sigma), self._log_sigma, self.cross_entropy)

    def equal_edges(self, iterations: int) -> list[float]:
        """K + 1 noise levels, strictly falling from sigma_max to sigma_min, between which the (tilted) curve falls by equal amounts."""
        low, high = self._tilted[0], self._tilted[-1]
        inner = [
            math.exp(_interpolate(high - k / iterations * (high - low), self._tilted, self._log_sigma)) for k in range(1, iterations)
        ]
        return [self.sigma_max, *inner, self.sigma_min]


class InformationEstimate:
    """Learns the curve: observations wait on the device, and are folded in now and then, earlier ones fading."""

    def __init__(self, sigma_min: float, sigma_max: float):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self._sums, self._counts = [0.0] * LEVELS, [0.0] * LEVELS
        self.pending = torch.zeros(2, LEVELS, dtype=torch.int64)
        """Observations since the last fold, this rank's own: cross-entropies and tokens, both in UNITs."""
        self.curve = self._fitted()

    def add(self, sigma: Tensor, losses: Tensor, weight: float = 1.0, counted: Tensor | None = None) -> None:
        """Cross-entropies [B, T] in nats, at noise levels [B, 1] or [B, T], each counted at the nearest point; waits for no device.

        weight: how many tokens each of them counts for. counted: bool [B, T], which of them do; None is all, and the others' must be 0.
        """
        self.pending = self.pending.to(losses.device)
        first, last = math.log(self.sigma_min), math.log(self.sigma_max)
        point = ((sigma.log() - first) * ((LEVELS - 1) / (last - first))).round().long().clamp(0, LEVELS - 1).flatten()
        # A step with a loss that is not finite is withdrawn; here it must only not become an arbitrary whole number.
        nats = losses.detach().double().nan_to_num(0.0).clamp(0, 1000)
        units = (nats * (weight / UNIT)).round().long().sum_to_size(sigma.shape).flatten()
        counted = torch.ones_like(nats) if counted is None else counted.double()
        tokens = (counted.sum_to_size(sigma.shape) * (weight / UNIT)).round().long().flatten()
        self.pending.index_add_(1, point, torch.stack((units, tokens)))

    def mark(self) -> None:
        """Keep what is pending, to withdraw what is added from here on."""
        self._marked = self.pending.clone()

    def withdraw(self, where: Tensor) -> None:
        """Go back to the mark where a bool scalar says so; waits for no device."""
        self.pending = torch.where(where, self._marked.to(self.pending.device), self.pending)

    def fold(self, total: Tensor) -> None:
        """Take in `pending`, summed over all ranks, and start it anew."""
        units, tokens = total.tolist()
        self._sums = [DECAY * before + UNIT * new for before, new in zip(self._sums, units)]
        self._counts = [DECAY * before + UNIT * new for before, new in zip(self._counts, tokens)]
        self.pending.zero_()
        self.curve = self._fitted()

    def _fitted(self) -> InformationCurve:
        """The monotone fit to the points of at least one token; the others lie on the line between their neighbours."""
        log_sigma = _log_levels(self.sigma_min, self.sigma_max)
        known = [point for point, count in enumerate(self._counts) if count >= 1]
        if not known:
            return InformationCurve.expected(self.sigma_min, self.sigma_max)
        means = isotonic([self._sums[point] / self._counts[point] for point in known], [self._counts[point] for point in known])
        positions = [log_sigma[point] for point in known]
        return InformationCurve(self.sigma_min, self.sigma_max, [_interpolate(x, positions, means) for x in log_sigma])

    def state(self, pending: Tensor) -> dict:
        """Plain numbers for a checkpoint; pending: summed over all ranks."""
        return {
            "information_curve": self.curve.cross_entropy, "sums": self._sums, "counts": self._counts, "pending": pending.tolist(),
        }

    def load_state(self, state: dict, is_main: bool) -> None:
        """Restore `state`; what was pending goes to one rank alone."""
        self._sums, self._counts = state["sums"], state["counts"]
        self.pending = torch.tensor(state["pending"], device=self.pending.device) * is_main
        self.curve = self._fitted()


def isotonic(values: list[float], weights: list[float]) -> list[float]:
    """The non-decreasing sequence that is nearest in weighted squares, by pooling adjacent violators (Ayer et al. 1955)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        length = 1
        while pools and pools[-1][0] > value:
            mean, pooled, members = pools.pop()
            value = (mean * pooled + value * weight) / (pooled + weight)
            weight, length = weight + pooled, length + members
        pools.append((value, weight, length))
    return [mean for mean, _, length in pools for _ in range(length)]


def _log_levels(sigma_min: float, sigma_max: float) -> list[float]:
    first, last = math.log(sigma_min), math.log(sigma_max)
    return [first + (last - first) * point / (LEVELS - 1) for point in range(LEVELS)]


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """The piecewise linear function through (xs, ys), xs rising, constant beyond its ends."""
    right = bisect_left(xs, x)
    if right == 0 or right == len(xs):
        return ys[min(right, len(xs) - 1)]
    part = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + part * (ys[right] - ys[right - 1])
