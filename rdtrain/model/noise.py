"""Noise levels: their distribution, its partition into K iterations, and the preconditioning that goes with a level.

Sources: DiffusionBlocks (arXiv 2506.14202), section 3.3 and appendices C and E; EDM (Karras et al. 2022, arXiv 2206.00364),
table 1. Iteration 1 owns the highest noise and iteration K the lowest. All of it is fp32 (or Python floats) whatever the model's
dtype. One thing differs from DiffusionBlocks on purpose: sigma_data is the true standard deviation of the target, 1/sqrt(d) for
unit-length embeddings of d channels, so that the core sees unit variance at every level.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass
class NoiseSettings:
    """The noise of a denoising model.

    p_mean, p_std: ln(sigma) ~ Normal(p_mean, p_std^2).
    sigma_min, sigma_max: the ends that the distribution is truncated to.
    overlap: gamma; the training interval [lo, hi] of an iteration is widened to [lo / a, hi * a] with a = (hi / lo)^gamma.
    share_at_sigma_max: the share of training sequences whose state is pure noise (sigma = sigma_max), which is the level that
        next-token prediction in one pass uses.
    """

    p_mean: float = -0.7
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    overlap: float = 0.1
    share_at_sigma_max: float = 0.3

    def __post_init__(self):
        """ValueError, in one sentence, for noise that cannot be."""
        for name, value in vars(self).items():
            if not math.isfinite(value):
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
        q_low, q_high = torch.special.ndtr((bounds.log() - p_mean) / p_std)
        log_sigma = p_mean + p_std * torch.special.ndtri(q_low + uniform.double() * (q_high - q_low))
        return log_sigma.exp().clamp(bounds[0], bounds[1]).float()


class EquiProbabilityPartition:
    """K intervals of equal probability under the noise distribution (DiffusionBlocks, section 3.3)."""

    def __init__(self, noise: LogNormalNoise, iterations: int):
        self.noise = noise
        self.iterations = iterations
        self.edges = [noise.quantile(1 - k / iterations) for k in range(iterations + 1)]
        """K + 1 noise levels, falling from sigma_max to sigma_min."""

    def interval(self, k: int) -> tuple[float, float]:
        """(low, high) of iteration k in 1..K, widened by the overlap and clipped to the ends: what it is trained on."""
        low, high = self.edges[k], self.edges[k - 1]
        widening = (high / low) ** self.noise.settings.overlap
        return max(low / widening, self.edges[-1]), min(high * widening, self.edges[0])

    def levels(self) -> list[float]:
        """K + 1 levels of the chain: iteration k runs at levels[k - 1], the top of its interval, and the last step ends at 0."""
        return self.edges[:-1] + [0.0]


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
