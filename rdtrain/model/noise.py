"""Noise levels: their distribution, its partition into K iterations, and the preconditioning that goes with a level.

Sources: DiffusionBlocks (arXiv 2506.14202), section 3.3 and appendices C and E; EDM (Karras et al. 2022, arXiv 2206.00364),
table 1. Iteration 1 owns the highest noise and iteration K the lowest. All of it is fp32 (or Python floats) whatever the model's
dtype. One thing differs from DiffusionBlocks on purpose: sigma_data is, unless it is set, the true standard deviation of the target,
1/sqrt(d) for unit-length embeddings of d channels, so that the core sees unit variance at every level.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from .information import InformationCurve


@dataclass
class NoiseSettings:
    """The noise of a denoising model.

    p_mean, p_std: ln(sigma) ~ Normal(p_mean, p_std^2).
    sigma_min, sigma_max: the ends that the distribution is truncated to.
    overlap: gamma; the training interval [lo, hi] of an iteration is widened to [lo / a, hi * a] with a = (hi / lo)^gamma.
    share_at_sigma_max: the share of training sequences (or tokens, see level_per) whose state is pure noise (sigma = sigma_max),
        which is the level that next-token prediction in one pass uses.
    partition: how the levels are divided into iterations: `equi_probability` under the distribution, `uniform` in ln(sigma), or
        `equal_information`: each iteration removes the same number of nats, by the curve that is learned in training.
    level_per: whether a `sequence` or each `token` has an iteration and a noise level of its own in training.
    sigma_data: the target's standard deviation that the preconditioning assumes; none: the true one, 1/sqrt(d).
    weighting: of the training loss: `none`, or `edm`: (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2. Logged losses have no weight.
    """

    p_mean: float = -0.7
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    overlap: float = 0.1
    share_at_sigma_max: float = 0.6
    partition: Literal["equi_probability", "uniform", "equal_information"] = "equi_probability"
    level_per: Literal["sequence", "token"] = "sequence"
    sigma_data: float | None = None
    weighting: Literal["none", "edm"] = "none"

    def __post_init__(self):
        """ValueError, in one sentence, for noise that cannot be."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, and it is {value}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min must be positive and below sigma_max, and they are {self.sigma_min} and {self.sigma_max}"
            )
        if self.p_std <= 0:
            raise ValueError(f"p_std must be positive, and it is {self.p_std}")
        ends = [NormalDist(self.p_mean, self.p_std).cdf(math.log(sigma)) for sigma in (self.sigma_min, self.sigma_max)]
        if ends[1] - ends[0] < 1e-6:
            raise ValueError(
                f"p_mean {self.p_mean} and p_std {self.p_std} leave no noise levels between sigma_min {self.sigma_min} and "
                f"sigma_max {self.sigma_max}"
            )
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must lie in [0, 1], and it is {self.overlap}")
        if not 0 <= self.share_at_sigma_max <= 1:
            raise ValueError(f"share_at_sigma_max must lie in [0, 1], and it is {self.share_at_sigma_max}")
        if self.sigma_data is not None and self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, or left out for the targets' own, and it is {self.sigma_data}")


class LogNormalNoise:
    """ln(sigma) ~ Normal(p_mean, p_std^2), truncated to [sigma_min, sigma_max]."""

    def __init__(self, settings: NoiseSettings):
        self.settings = settings
        self._normal = NormalDist(settings.p_mean, settings.p_std)
        self._low, self._high = self._normal.cdf(math.log(settings.sigma_min)), self._normal.cdf(math.log(settings.sigma_max))

    def cdf(self, sigma: float) -> float:
        """P(noise level <= sigma), for sigma within the ends."""
        return (self._normal.cdf(math.log(sigma)) - self._low) / (self._high - self._low)

    def quantile(self, q: float) -> float:
        """The sigma with cdf(sigma) = q. The two ends come back exactly."""
        if q <= 0:
            return self.settings.sigma_min
        if q >= 1:
            return self.settings.sigma_max
        return math.exp(self._normal.inv_cdf(self._low + q * (self._high - self._low)))

    def sample(self, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Noise levels from the distribution restricted to [low, high], from uniform numbers in (0, 1); all of one shape."""
        p_mean, p_std = self.settings.p_mean, self.settings.p_std
        # float64: near the ends the normal's cdf has less room in fp32 than an interval is wide.
        bounds = torch.stack((low, high)).double()
        ends, uniform = (bounds.log() - p_mean) / p_std, uniform.double()
        # Above the mean the mirror image is used: the cdf keeps its digits near 0 (by erfc; torch's ndtr does not) and loses them near 1.
        mirrored = ends[0] > 0
        ends, uniform = torch.where(mirrored, -ends.flip(0), ends), torch.where(mirrored, 1 - uniform, uniform)
        q_low, q_high = torch.erfc(-ends / math.sqrt(2)) / 2
        normal = torch.special.ndtri(q_low + uniform * (q_high - q_low))
        log_sigma = p_mean + p_std * torch.where(mirrored, -normal, normal)
        return log_sigma.exp().clamp(bounds[0], bounds[1]).float()


class NoiseSchedule:
    """All there is to know of noise levels, for any number of iterations K: training and generation both ask it."""

    def __init__(self, settings: NoiseSettings, curve: InformationCurve | None = None):
        """curve: cross-entropy against sigma, which partition=equal_information needs."""
        self.settings = settings
        self.curve = curve
        self.distribution = LogNormalNoise(settings)

    @classmethod
    def from_plain(cls, settings: dict, curve: list[float] | None) -> "NoiseSchedule":
        """From what a checkpoint or an export holds: the fields of NoiseSettings, and the curve's points where there are some."""
        noise = NoiseSettings(**settings)
        return cls(noise, None if curve is None else InformationCurve(noise.sigma_min, noise.sigma_max, curve))

    def edges(self, iterations: int) -> list[float]:
        """K + 1 noise levels, falling from sigma_max to sigma_min: iteration k in 1..K owns [edges[k], edges[k - 1]].

        ValueError for partition=equal_information without a curve.
        """
        settings = self.settings
        if settings.partition == "equi_probability":  # DiffusionBlocks, section 3.3
            return [self.distribution.quantile(1 - k / iterations) for k in range(iterations + 1)]
        if settings.partition == "uniform":
            ratio = settings.sigma_min / settings.sigma_max
            inner = [settings.sigma_max * ratio ** (k / iterations) for k in range(1, iterations)]
            return [settings.sigma_max, *inner, settings.sigma_min]
        if self.curve is None:
            raise ValueError("noise levels of equal information need the curve that is learned in training: give a model that has one")
        return self.curve.equal_edges(iterations)

    def intervals(self, iterations: int) -> list[tuple[float, float]]:
        """(low, high) of each iteration, widened by the overlap and clipped to the ends: what it is trained on."""
        edges = self.edges(iterations)
        widened = []
        for high, low in zip(edges, edges[1:]):
            widening = (high / low) ** self.settings.overlap
            widened.append((max(low / widening, edges[-1]), min(high * widening, edges[0])))
        return widened

    def levels(self, iterations: int) -> list[float]:
        """K + 1 levels of the Euler chain: iteration k runs at levels[k - 1], the top of its interval, and the last step ends at 0."""
        return self.edges(iterations)[:-1] + [0.0]

    def sigma_data(self, width: int) -> float:
        """The standard deviation of a target's components that the preconditioning assumes, for targets of `width` channels."""
        return 1 / math.sqrt(width) if self.settings.sigma_data is None else self.settings.sigma_data


@dataclass
class Preconditioning:
    """EDM's scalings of a noise level, each of sigma's shape: D = c_skip * z + c_out * F(c_in * z; c_noise)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor

    @classmethod
    def at(cls, sigma: Tensor, sigma_data: float) -> "Preconditioning":
        """sigma: any shape, fp32 (EDM, table 1)."""
        total = sigma.square() + sigma_data**2
        return cls(
            c_skip=sigma_data**2 / total,
            c_out=sigma * sigma_data * total.rsqrt(),
            c_in=total.rsqrt(),
            c_noise=sigma.log() / 4,
        )


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's weight of the loss at a noise level, 1 / c_out^2, of sigma's shape (EDM, table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
