"""Solvers: how a position's state z gets from one noise level to the next below it, given the logits of the iteration in between.

Each makes one step an iteration, from one evaluation of the model. Euler and multistep solve the probability-flow ODE of EDM
(Karras et al. 2022, arXiv 2206.00364),

    dz / d sigma = (z - D(z, sigma)) / sigma        or, with t = -ln sigma,        dz / dt = D - z,

where D is the expected target: they are deterministic, and approach the exact flow as iterations are added. Ancestral is random and
needs no approach: a token drawn from the exact posterior of each level, and fresh noise, keep the law of z exact at any levels.

Nothing here knows a network: the tests run the solvers on a posterior in closed form. Tensors are of any leading shape, computed in
the dtype that they come in; noise levels are Python floats.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .compiled import is_sum
from .text_random import ITERATION, PositionRandom

PART = 512
"""Tokens of each part in which compiled code takes the mean of all targets: as many numbers of a row as the smallest rows of weights that
it reads at full speed."""


def draw_tokens(logits: Tensor, exponential: Tensor) -> Tensor:
    """Tokens [...] from softmax(logits [..., V]), by the Gumbel maximum: unlike torch.multinomial, without waiting for the device.

    exponential: exponential numbers of mean 1, none of them 0, of the logits' shape.
    """
    return (logits - exponential.log()).argmax(-1)


def euler_step(z: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One Euler step of the ODE from sigma down to sigma_next >= 0, written as an average.

    z + (sigma_next - sigma) / sigma * (z - D), EDM's algorithm 1; the sign in DiffusionBlocks' printed equations 3-5 would make
    the noise grow. In t it is exact for a D that stays what it is over the step.
    """
    return torch.lerp(denoised, z, sigma_next / sigma)


def multistep_step(z: Tensor, denoised: Tensor, previous: Tensor, sigma_previous: float, sigma: float, sigma_next: float) -> Tensor:
    """One step of second order from sigma down to sigma_next, with the D of the level before as well.

    The ODE dz/dt = D - z has the solution, over a step of h = ln(sigma / sigma_next) from t,

        z(t + h) = e^-h z(t) + integral_0^h e^(u - h) D(t + u) du.

    D at the middle of the step, extrapolated from the two that are known, D + (h / 2) (D - D_previous) / h_previous with
    h_previous = ln(sigma_previous / sigma), comes before the integral, whose weight is 1 - e^-h. The weight is symmetric about the
    middle to first order in h, so that the error of a step is O(h^3). (DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, has the
    same form.) A step to sigma_next = 0 is infinitely long in t, has no middle, and ends on D.
    """
    if sigma_next == 0:
        return euler_step(z, denoised, sigma, sigma_next)
    ratio = math.log(sigma / sigma_next) / math.log(sigma_previous / sigma)
    return euler_step(z, denoised + ratio / 2 * (denoised - previous), sigma, sigma_next)


def ancestral_step(z: Tensor, target: Tensor, eps: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """A sample of z at sigma_next given z at sigma and the clean target y, from standard normal numbers eps of z's shape.

    The noise grows by independent parts, z = z' + sqrt(sigma^2 - sigma_next^2) eta with z' = y + sigma_next eps', so that by Bayes

        z' given z, y ~ Normal(r z + (1 - r) y, (1 - r) sigma_next^2),        r = sigma_next^2 / sigma^2.
    """
    keep = (sigma_next / sigma) ** 2
    return keep * z + (1 - keep) * target + math.sqrt(1 - keep) * sigma_next * eps


def expected_target(logits: Tensor, unit_embeddings: Tensor) -> Tensor:
    """The mean of all targets [V, d] under logits [..., V] -> [..., d], by a product in the targets' dtype."""
    vocabulary = logits.shape[-1]
    if torch.compiler.is_compiling() and is_sum(logits.numel() // vocabulary, unit_embeddings) and vocabulary % PART == 0:
        return mean_by_parts(logits.view(vocabulary), unit_embeddings.t()).view(*logits.shape[:-1], -1)
    return (logits.softmax(-1).to(unit_embeddings.dtype) @ unit_embeddings).to(logits.dtype)


def mean_by_parts(logits: Tensor, rows: Tensor) -> Tensor:
    """`expected_target` of one position in fp32, for compiled code: logits [V], rows [d, V] -> [d], for V a multiple of PART.

    Of a softmax and a product the compiler makes three kernels: the softmax's statistics, a sum over parts of the tokens, and the sum of
    these. Here every part of each channel's row takes its largest logit and its sum of weights anew, so that one kernel sums the parts and
    a second all of them.
    """
    channels, tokens = rows.shape
    parts = logits.view(1, tokens // PART, PART).expand(channels, -1, -1)
    largest = parts.amax(-1).clamp_min(torch.finfo(logits.dtype).min)  # a part whose logits are all -inf has no weight
    weights = (parts - largest.unsqueeze(-1)).exp()
    share = (largest - largest.amax(-1, keepdim=True)).exp()
    sums = (weights * rows.view(parts.shape)).sum(-1)
    return (share * sums).sum(-1) / (share * weights.sum(-1)).sum(-1)


class Solver:
    """The way of positions [B, n] down the levels; made anew for each. z is [B, n, d].

    unit_embeddings: [V, d], the target of each token, in the dtype that their products are taken in. random: the positions' random numbers,
    of which iteration k, from 0, has two purposes of its own: ITERATION + 2 k and the next. top_k: the likeliest tokens of which D is the
    mean, or x is drawn; 0: all. With few rows, where a product with all targets takes as long as the head, it saves that.
    mean: `expected_target`, compiled or not.
    """

    mean: Callable[[Tensor, Tensor], Tensor] = staticmethod(expected_target)

    def __init__(self, unit_embeddings: Tensor, random: PositionRandom, top_k: int = 0):
        self.unit_embeddings, self.random, self.top_k = unit_embeddings, random, min(top_k, len(unit_embeddings))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows [R] of the batch."""
        self.random = self.random.rows(rows)

    def step(self, z: Tensor, logits: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """z [..., d] at sigma and the logits [..., V] of the iteration that ran there -> z at sigma_next < sigma."""
        raise NotImplementedError

    def expected(self, logits: Tensor) -> Tensor:
        """D, the expected target under logits [..., V] -> [..., d]."""
        if not self.top_k:
            return self.mean(logits, self.unit_embeddings)
        logits, tokens = logits.topk(self.top_k)
        weights = logits.softmax(-1).to(self.unit_embeddings.dtype).unsqueeze(-2)
        return (weights @ self.unit_embeddings[tokens]).squeeze(-2).to(logits.dtype)

    def drawn(self, logits: Tensor, purpose: int) -> Tensor:
        """Tokens [...] drawn from softmax(logits [..., V])."""
        if not self.top_k:
            return draw_tokens(logits, self.random.exponential(purpose, logits.shape[-1]))
        logits, tokens = logits.topk(self.top_k)
        return tokens.gather(-1, draw_tokens(logits, self.random.exponential(purpose, self.top_k)).unsqueeze(-1)).squeeze(-1)


class EulerSolver(Solver):
    """EDM's algorithm 1, of first order; the chain of DiffusionBlocks (arXiv 2506.14202)."""

    def step(self, z: Tensor, logits: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Euler's step with D the expected target."""
        return euler_step(z, self.expected(logits), sigma, sigma_next)


class MultistepSolver(Solver):
    """Second order: each step also uses the D of the iteration before. The first step, which has none, is Euler's.

    That costs no order: D is the mean of all targets, whatever z, where the noise drowns them.
    """

    def __init__(self, unit_embeddings: Tensor, random: PositionRandom, top_k: int = 0):
        super().__init__(unit_embeddings, random, top_k)
        self._previous: tuple[Tensor, float] | None = None

    def keep(self, rows: Tensor) -> None:
        """The same, and of what is remembered."""
        super().keep(rows)
        if self._previous is not None:
            self._previous = self._previous[0][rows], self._previous[1]

    def step(self, z: Tensor, logits: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """A step of second order; consecutive calls are consecutive iterations."""
        denoised, previous = self.expected(logits), self._previous
        self._previous = denoised, sigma
        if previous is None:
            return euler_step(z, denoised, sigma, sigma_next)
        return multistep_step(z, denoised, *previous, sigma, sigma_next)


class AncestralSolver(Solver):
    """Draws a token at each level, x ~ softmax(logits), and then z' given z and x.

    With exact logits, z' has the law of targets noised to sigma_next if z has that of targets noised to sigma, so a chain of any length
    at any levels draws its tokens from the exact distribution. (At the start, pure noise stands for targets noised to sigma_max; the
    targets have length one, so the tokens are off by a relative 1 / sigma_max^2 or so.)
    """

    def __init__(self, unit_embeddings: Tensor, random: PositionRandom, top_k: int = 0):
        super().__init__(unit_embeddings, random, top_k)
        self._purpose = ITERATION

    def step(self, z: Tensor, logits: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The token's random numbers are of an iteration's first purpose, the noise of its second."""
        target = self.unit_embeddings[self.drawn(logits, self._purpose)]
        eps = self.random.normal(self._purpose + 1, z.shape[-1])
        self._purpose += 2
        return ancestral_step(z, target, eps, sigma, sigma_next)


SOLVERS = {"euler": EulerSolver, "multistep": MultistepSolver, "ancestral": AncestralSolver}
