"""Proves the Euler chain right against the mathematics of the probability-flow ODE: it follows a perfect denoiser to the target,
equals the ODE's form, and approaches the analytic solution for Gaussian data, so that noise shrinks."""

import math

import pytest
import torch

from rdtrain.model.noise import NoiseSchedule, NoiseSettings, euler_step


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
