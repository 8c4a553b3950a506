"""Proves the solvers right against the mathematics: Euler against the form and the analytic flow of Gaussian data, Euler and multistep
against scipy's solution of the probability-flow ODE in a world whose posterior is known, ancestral against that world's prior."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import chisquare

from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.solvers import SOLVERS, ancestral_step, draw_tokens, euler_step, multistep_step
from rdtrain.model.text_random import TOKEN, TextRandom


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random(rows, seed):
    """The random numbers of one position of so many texts."""
    return TextRandom(torch.arange(rows) + 1_000_000 * seed).at(torch.zeros(1, 1, dtype=torch.long))


def levels(iterations):
    return NoiseSchedule(NoiseSettings()).levels(iterations)


@pytest.mark.parametrize("iterations", [1, 2, 8, 32])
def test_a_perfect_denoiser_keeps_the_chain_at_target_plus_the_levels_noise_and_ends_on_the_target(iterations):
    y, eps = draw(4, 16, seed=0), draw(4, 16, seed=1)
    chain = levels(iterations)
    z = y + chain[0] * eps
    for sigma, sigma_next in zip(chain, chain[1:]):
        z = euler_step(z, y, sigma, sigma_next)
        torch.testing.assert_close(z, y + sigma_next * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma, sigma_next", [(80.0, 3.0), (3.0, 2.9), (0.5, 0.002), (0.002, 0.0)])
def test_a_step_equals_the_form_of_the_ode(sigma, sigma_next):
    z, denoised = draw(5, 8, seed=2), draw(5, 8, seed=3)
    expected = z + (sigma_next - sigma) / sigma * (z - denoised)
    torch.testing.assert_close(euler_step(z, denoised, sigma, sigma_next), expected, rtol=1e-12, atol=1e-12)


def test_a_step_to_zero_noise_returns_the_denoised_value_exactly():
    z, denoised = draw(5, 8, seed=4).float(), draw(5, 8, seed=5).float()
    assert torch.equal(euler_step(z, denoised, 0.7, 0.0), denoised)


def largest_error_for_gaussian_data(iterations, sd):
    """Largest relative distance of the chain from z(s) = z(s0) sqrt((sd^2 + s^2) / (sd^2 + s0^2)), over all levels."""
    chain = levels(iterations)
    start = chain[0] * draw(64, seed=6)
    z, worst = start, 0.0
    for sigma, sigma_next in zip(chain, chain[1:]):
        exact_denoiser = sd**2 / (sd**2 + sigma**2) * z
        z = euler_step(z, exact_denoiser, sigma, sigma_next)
        solution = start * math.sqrt((sd**2 + sigma_next**2) / (sd**2 + chain[0] ** 2))
        worst = max(worst, ((z - solution) / solution).abs().max().item())
    return worst


@pytest.mark.parametrize("sd", [0.2, 1.0])
def test_many_steps_approach_the_analytic_flow_of_gaussian_data_with_first_order_error(sd):
    coarse, fine = largest_error_for_gaussian_data(1000, sd), largest_error_for_gaussian_data(4000, sd)
    assert fine < 0.02
    assert fine < coarse / 2.5


@pytest.mark.parametrize("top_k", [0, 20])
def test_the_expected_target_in_bf16_is_off_by_its_rounding_alone(top_k):
    targets, logits = torch.nn.functional.normalize(draw(500, 64, seed=7), dim=-1), 4 * draw(8, 1, 500, seed=8)
    exact, rough = (SOLVERS["euler"](table, None, top_k).expected(of) for table, of in
                    ((targets, logits), (targets.bfloat16(), logits.float())))
    assert rough.dtype == torch.float32 and rough.shape == (8, 1, 64)
    assert 0 < (rough - exact).norm(dim=-1).max() < 3 * 2**-9  # weights, targets of length one, and the sum, each by 2^-9 at most


class Toy:
    """Six targets of length one in four dimensions, with a prior: the exact logits at any noise level are those of Bayes' rule."""

    def __init__(self):
        self.prior = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.07, 0.03], dtype=torch.float64)
        self.targets = torch.nn.functional.normalize(draw(6, 4, seed=7), dim=-1)

    def logits(self, z, sigma):
        """log p(x, z) at sigma up to a constant: from -|z - y|^2 / 2 sigma^2, where all y are of length one."""
        return self.prior.log() + z @ self.targets.T / sigma**2

    def run(self, name, z, chain, seed=0):
        """Down the levels of the chain from z [N, 4] at its first, and the logits at the last."""
        z, solver = z.unsqueeze(1), SOLVERS[name](self.targets, random(len(z), seed))
        for sigma, sigma_next in zip(chain, chain[1:]):
            z = solver.step(z, self.logits(z, sigma), sigma, sigma_next)
        return z[:, 0], self.logits(z, chain[-1])[:, 0]


def flow_in_sigma(toy, z, first, last):
    """The probability-flow ODE in its form over sigma, EDM's equation 1 with s(t) = 1, solved by scipy for one z."""

    def velocity(sigma, z):
        weight = toy.prior.numpy() * np.exp(-((z - toy.targets.numpy()) ** 2).sum(-1) / (2 * sigma**2))
        return (z - weight @ toy.targets.numpy() / weight.sum()) / sigma

    return solve_ivp(velocity, (first, last), z.numpy(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]


@pytest.mark.parametrize("name, order", [("euler", 1), ("multistep", 2)])
def test_a_solver_approaches_the_flow_that_scipy_finds_with_the_error_of_its_order(name, order):
    toy, first, last = Toy(), 20.0, 0.3
    start = first * draw(8, 4, seed=8)
    expected = torch.tensor(np.stack([flow_in_sigma(toy, z, first, last) for z in start]))
    errors = []
    for iterations in (64, 128, 256):
        chain = [first * (last / first) ** (k / iterations) for k in range(iterations + 1)]
        errors.append((toy.run(name, start, chain)[0] - expected).norm().item())
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:])]
    assert all(0.8 * 2**order < ratio < 1.25 * 2**order for ratio in ratios), ratios
    assert errors[-1] < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["euler", "multistep", "ancestral"])
def test_the_likeliest_tokens_alone_are_those_of_logits_without_the_others(name):
    targets, z, logits = Toy().targets, draw(50, 1, 4, seed=3), 2 * draw(50, 1, 6, seed=4)
    cut = logits.masked_fill(logits < logits.sort(descending=True).values[..., 2:3], -torch.inf)
    few, all_of_them = SOLVERS[name](targets, random(50, 1), 3), SOLVERS[name](targets, random(50, 1), 6)
    for sigma in (4.0, 2.0):
        one, other = few.step(z, logits, sigma, sigma / 2), all_of_them.step(z, cut, sigma, sigma / 2)
        if name == "ancestral":  # the draws are others, as there are fewer numbers to draw by: the noise is the same
            kept = 0.75 * targets[cut.isfinite().nonzero()[:, 2].view(50, 1, 3)] + 0.25 * z.unsqueeze(2)
            noise = random(50, 1).normal(3 if sigma == 4 else 5, 4).unsqueeze(2) * math.sqrt(0.75) * sigma / 2
            assert ((kept + noise - one.unsqueeze(2)).abs().amax(-1) < 1e-6).any(2).all()
        else:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        z = one


def test_multistep_is_nearer_to_the_flow_than_euler_on_the_levels_of_inference():
    """At a noise level that the chain of every K passes (the median), from the highest."""
    toy = Toy()
    start = 80 * draw(16, 4, seed=9)
    half = levels(2)[1]
    expected = torch.tensor(np.stack([flow_in_sigma(toy, z, 80, half) for z in start]))
    for iterations in (16, 32, 64):
        euler, multistep = (
            (toy.run(name, start, levels(iterations)[: iterations // 2 + 1])[0] - expected).norm() for name in ("euler", "multistep")
        )
        assert multistep < euler / 2, iterations


def chance_of_the_priors_tokens(name, iterations, seed):
    """The p-value of Pearson's chi-square for 20,000 tokens drawn by a chain against the prior."""
    toy, number = Toy(), 20_000
    chain = levels(iterations)[:-1]
    _, logits = toy.run(name, chain[0] * draw(number, 4, seed=seed), chain, seed)
    counts = draw_tokens(logits, random(number, seed).exponential(TOKEN, 6)[:, 0]).bincount(minlength=6)
    return chisquare(counts.numpy(), number * toy.prior.numpy() / toy.prior.sum().item()).pvalue


@pytest.mark.parametrize("iterations", [2, 4, 16])
def test_ancestral_draws_tokens_as_often_as_the_prior_says_at_any_number_of_iterations(iterations):
    assert chance_of_the_priors_tokens("ancestral", iterations, seed=10) > 0.01


def test_the_euler_chain_of_few_iterations_does_not():
    assert chance_of_the_priors_tokens("euler", 2, seed=10) < 1e-9


def test_an_ancestral_step_is_bayes_rule_for_two_gaussians():
    """Mean and variance from the joint law of z' and z by conditioning, for a scalar y."""
    sigma, sigma_next, y, z = 1.7, 0.6, 0.8, 2.3
    covariance = np.array([[sigma_next**2, sigma_next**2], [sigma_next**2, sigma**2]])  # of (z', z) given y; the noise of z' is in z
    mean = y + covariance[0, 1] / covariance[1, 1] * (z - y)
    deviation = math.sqrt(covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1])
    eps = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    step = ancestral_step(torch.full_like(eps, z), torch.full_like(eps, y), eps, sigma, sigma_next)
    torch.testing.assert_close(step, mean + deviation * eps, rtol=1e-12, atol=1e-12)


def test_a_multistep_step_to_zero_noise_ends_on_the_denoised_value():
    z, denoised, previous = draw(3, 5, 8, seed=11)
    assert torch.equal(multistep_step(z, denoised, previous, 1.0, 0.5, 0.0), denoised)
