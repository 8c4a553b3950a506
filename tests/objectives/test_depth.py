"""Proves the drawn depth right against Huginn's mixture, integrated by scipy, and the same on every rank and micro-batch of a step."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from rdtrain.objectives import ObjectiveSettings
from rdtrain.objectives.bptt import BackpropagationThroughTime
from rdtrain.objectives.depth import FixedDepth, PoissonDepth
from rdtrain.randomness import SampleRandom


def mixture(iterations, function):
    """The mean of function(rate) over rate ~ LogNormal(ln r - 1/8, 1/2), by adaptive quadrature."""
    law = scipy.stats.lognorm(0.5, scale=iterations * math.exp(-1 / 8))
    edges = law.ppf([1e-13, 1e-6, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-6, 1 - 1e-13])
    parts = (scipy.integrate.quad(lambda rate: law.pdf(rate) * function(rate), *pair, limit=200)[0] for pair in zip(edges, edges[1:]))
    return sum(parts)


def probability_of_at_most(depth, iterations):
    return mixture(iterations, lambda rate: scipy.stats.poisson.cdf(depth - 1, rate))


def draws(iterations, count):
    depth = PoissonDepth(iterations)
    return np.array([depth.draw(SampleRandom(3, [], torch.device("cpu"), step).of_step()) for step in range(count)])


@pytest.mark.parametrize("iterations", [1, 4, 32])
def test_drawn_depths_follow_the_log_normal_poisson_mixture(iterations):
    depths = draws(iterations, 20_000)
    edges = np.unique(np.quantile(depths, np.linspace(0, 1, 15)[1:-1]).astype(int))
    observed = np.histogram(depths, [0, *(edges + 0.5), np.inf])[0]
    cumulative = [0.0, *(probability_of_at_most(edge, iterations) for edge in edges), 1.0]
    assert scipy.stats.chisquare(observed, 20_000 * np.diff(cumulative)).pvalue > 0.001
    assert depths.min() == 1 or iterations == 32
    assert depths.mean() == pytest.approx(iterations + 1, rel=0.02)


def test_huginns_depth_of_32_has_its_published_quantiles():
    for level, depth in ((0.5, 29), (0.95, 67)):
        assert probability_of_at_most(depth - 1, 32) < level <= probability_of_at_most(depth, 32)
    depths = draws(32, 20_000)
    assert np.quantile(depths, [0.5, 0.95]) == pytest.approx([29, 67], abs=1)


def test_the_deepest_model_is_drawn_as_deep_as_it_should_be():
    """At r = 65,536 a Poisson number is its rate, to within half a percent."""
    logarithms = np.log(draws(65_536, 60))
    assert scipy.stats.kstest(logarithms, scipy.stats.norm(math.log(65_536) - 1 / 8, 0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("iterations, limit", [(1, 1), (1, 3), (4, 2), (32, 8), (32, 40), (1000, 900), (65_536, 8)])
def test_the_mean_of_the_smaller_of_depth_and_limit_is_that_of_the_mixture(iterations, limit):
    def minimum(rate):  # E min(N + 1, limit) is the sum of P(N >= j) over j < limit
        return scipy.stats.poisson.sf(np.arange(limit) - 1, rate).sum()

    assert PoissonDepth(iterations).mean_of_minimum(limit) == pytest.approx(mixture(iterations, minimum), rel=1e-8)


def test_a_fixed_depth_is_itself():
    assert FixedDepth(5).draw(None) == FixedDepth(5).mean == FixedDepth(5).mean_of_minimum(math.inf) == 5
    assert FixedDepth(5).mean_of_minimum(2) == 2
    assert PoissonDepth(5).mean_of_minimum(math.inf) == 6


def test_a_step_has_one_depth_whatever_its_split_and_steps_and_seeds_differ(build_model, tokens, random_of):
    """Two ranks of two micro-batches each, another split, and the same step once more, as after a resume."""
    model, objective = build_model(False), BackpropagationThroughTime(ObjectiveSettings("bptt", trained_iterations=1), 8)

    def depth(rows, step, seed=5):
        total, count = objective(model, tokens[rows], random_of(rows, seed, step)).metrics["depth"]
        assert count == 1
        return total.item()

    with torch.no_grad():
        for step in (0, 17):
            assert len({depth(rows, step) for rows in ([0, 1], [2, 3], [4, 5], [0, 1, 2], [3, 4, 5], [0, 1])}) == 1
        assert len({depth([0], step) for step in range(12)}) > 4
        assert len({depth([0], 0, seed) for seed in range(12)}) > 4
