"""How many iterations a training step of the unrolled model runs: a fixed number, or one drawn for each step as in Huginn.

Both kinds know their distribution exactly, so that the FLOPs of training are a mean over it and not over a sample.
"""

import math
from random import Random

import torch

RATE_DEVIATION = 0.5
"""Standard deviation of the logarithm of the Poisson rate."""


class FixedDepth:
    """Every step runs the same number of iterations. mean: that number."""

    def __init__(self, iterations: int):
        self.mean = iterations

    def draw(self, random: Random) -> int:
        """The depth of a step; takes no random number."""
        return self.mean

    def mean_of_minimum(self, limit: float) -> float:
        """The mean of min(depth, limit)."""
        return min(self.mean, limit)


class PoissonDepth:
    """Huginn's log-normal Poisson (arXiv 2502.05171): rate ~ LogNormal(ln r - 1/8, 1/2), depth = Poisson(rate) + 1.

    The rate's mean is r, the model's K; mean: the depth's, r + 1. Right for every r from 1 to 65,536.
    """

    def __init__(self, iterations: int):
        self._mean_of_logarithm = math.log(iterations) - RATE_DEVIATION**2 / 2
        self.mean = iterations + 1

    def draw(self, random: Random) -> int:
        """The depth of a step, from a generator that belongs to the step."""
        rate = random.lognormvariate(self._mean_of_logarithm, RATE_DEVIATION)
        # One plus the arrivals of a Poisson process of rate 1 until time `rate`: exact, and nothing next to as many iterations.
        depth, time = 1, random.expovariate(1.0)
        while time < rate:
            depth, time = depth + 1, time + random.expovariate(1.0)
        return depth

    def mean_of_minimum(self, limit: float) -> float:
        """The mean of min(depth, limit), limit a whole number from 1 or infinity, to a relative 1e-9.

        Given the rate it has a closed form: with m = limit - 1, N ~ Poisson(rate) and P(N < a) = Q(a, rate), the regularised upper
        incomplete gamma function, E min(N, m) = m (1 - Q(m + 1, rate)) + rate Q(m, rate). The trapezoidal rule takes its mean over
        the normal logarithm of the rate; it converges exponentially for a smooth integrand.
        """
        if limit == math.inf:
            return self.mean
        x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
        density = torch.exp(-(x**2) / 2)
        rate = torch.exp(self._mean_of_logarithm + RATE_DEVIATION * x)
        m = torch.full_like(x, limit - 1)
        minimum = m * torch.special.gammainc(m + 1, rate) + rate * torch.special.gammaincc(m, rate)
        return 1 + ((density * minimum).sum() / density.sum()).item()
