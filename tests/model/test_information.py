"""Proves the information curve right: the monotone fit against scipy, equal-information edges against an analytic curve, what is
learned against a slow loop, and that order, ranks and interruptions leave no trace in it."""

import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from rdtrain.model.information import DECAY, LEVELS, TILT, InformationCurve, InformationEstimate, isotonic

LOW, HIGH = 0.002, 80.0
POINTS = np.exp(np.linspace(math.log(LOW), math.log(HIGH), LEVELS))


@pytest.mark.parametrize("seed", range(20))
def test_the_monotone_fit_is_scipys(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 70)
    values = np.linspace(0, rng.choice([-3, 0, 3]), count) + rng.normal(size=count).round(rng.integers(0, 6))  # rounded: some are equal
    weights = rng.exponential(size=count) ** 3 + 1e-6
    expected = scipy.optimize.isotonic_regression(values, weights=weights).x
    np.testing.assert_allclose(isotonic(values.tolist(), weights.tolist()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 7, 32, 64])
def test_edges_remove_equal_amounts_of_a_known_curve(iterations):
    def nats(x):
        return 4 / (1 + math.exp(-3 * (x + 1)))

    def tilted(x):
        return nats(x) + TILT * (x - math.log(LOW))

    edges = InformationCurve(LOW, HIGH, [nats(math.log(sigma)) for sigma in POINTS]).equal_edges(iterations)
    assert edges[0] == HIGH and edges[-1] == LOW and len(edges) == iterations + 1
    assert all(above > below for above, below in zip(edges, edges[1:]))
    whole = tilted(math.log(HIGH)) - tilted(math.log(LOW))
    for k, edge in enumerate(edges[1:-1], start=1):
        goal = tilted(math.log(HIGH)) - k / iterations * whole
        # Linear between points h = 0.17 apart, the curve is off by up to its second derivative, 3.5, times h^2 / 8.
        assert tilted(math.log(edge)) == pytest.approx(goal, abs=0.0125)


def test_a_curve_without_any_fall_is_divided_evenly_in_the_logarithm():
    edges = InformationCurve(LOW, HIGH, [9.0] * LEVELS).equal_edges(8)
    np.testing.assert_allclose(edges, np.geomspace(HIGH, LOW, 9), rtol=1e-9)


def test_the_curve_is_linear_in_the_logarithm_between_its_points_and_constant_beyond():
    values = np.sort(np.random.default_rng(0).normal(size=LEVELS))
    curve = InformationCurve(LOW, HIGH, values.tolist())
    for sigma in np.geomspace(LOW / 10, HIGH * 10, 300):
        assert curve.at(sigma) == pytest.approx(np.interp(math.log(sigma), np.log(POINTS), values), abs=1e-9)
    with pytest.raises(ValueError, match="64 points, and this one has 2"):
        InformationCurve(LOW, HIGH, [0.0, 1.0])


def test_before_anything_is_measured_the_curve_falls_to_half_at_the_critical_noise():
    curve = InformationEstimate(LOW, HIGH).curve
    assert curve.at(HIGH) == pytest.approx(math.log(8192)) and curve.at(LOW) < 1e-9
    assert curve.at(1 / math.sqrt(2 * math.log(8192))) == pytest.approx(math.log(8192) / 2, abs=0.05)


def observations(seed, per_token, rows=24, length=10):
    generator = torch.Generator().manual_seed(seed)
    sigma = (torch.randn(rows, length if per_token else 1, generator=generator) * 1.2 - 0.7).exp().clamp(LOW, HIGH)
    sigma[0] = HIGH
    return sigma, 4 * torch.rand(rows, length, generator=generator) * sigma / (sigma + 0.3)


@pytest.mark.parametrize("per_token", [False, True])
def test_what_is_learned_equals_a_slow_loop(per_token):
    estimate, sums, counts = InformationEstimate(LOW, HIGH), np.zeros(LEVELS), np.zeros(LEVELS)
    for fold in range(3):
        sums, counts = DECAY * sums, DECAY * counts
        for part in range(2):
            sigma, losses = observations(10 * fold + part, per_token)
            estimate.add(sigma, losses)
            for row in range(len(losses)):
                for position in range(losses.shape[1]):
                    level = sigma[row, position if per_token else 0].item()
                    nearest = np.argmin(np.abs(np.log(POINTS) - math.log(level)))
                    sums[nearest] += losses[row, position].item()
                    counts[nearest] += 1
        estimate.fold(estimate.pending)
    known = counts >= 1
    assert 5 < known.sum() < LEVELS
    fitted = scipy.optimize.isotonic_regression(sums[known] / counts[known], weights=counts[known]).x
    expected = np.interp(np.log(POINTS), np.log(POINTS)[known], fitted)
    np.testing.assert_allclose(estimate.curve.cross_entropy, expected, atol=1e-5)


def test_order_ranks_and_interruptions_leave_no_trace_to_the_last_bit():
    """One rank that sees everything at once, against two ranks that see it in another order and are stopped between two folds."""
    batches = [observations(seed, per_token=False) for seed in range(8)]
    whole = InformationEstimate(LOW, HIGH)
    for first in (0, 4):
        for sigma, losses in batches[first : first + 4]:
            whole.add(sigma, losses)
        whole.fold(whole.pending)

    ranks = [InformationEstimate(LOW, HIGH) for _ in range(2)]
    for first in (0, 4):
        for rank, estimate in enumerate(ranks):
            for sigma, losses in reversed(batches[first + rank : first + 4 : 2]):
                for rows in (slice(0, 7), slice(7, None)):
                    estimate.add(sigma[rows], losses[rows])
                total = ranks[0].pending + ranks[1].pending
                state = json.loads(json.dumps(estimate.state(total)))
                ranks = [InformationEstimate(LOW, HIGH) for _ in range(2)] if rank else ranks
                if rank:
                    for number, resumed in enumerate(ranks):
                        resumed.load_state(state, is_main=number == 0)
                    estimate = ranks[1]
        total = ranks[0].pending + ranks[1].pending
        for estimate in ranks:
            estimate.fold(total)
    for estimate in ranks:
        assert estimate.curve.cross_entropy == whole.curve.cross_entropy
        assert estimate.pending.sum() == 0


def test_losses_that_are_not_finite_do_not_spoil_the_curves_numbers():
    estimate = InformationEstimate(LOW, HIGH)
    estimate.add(torch.ones(1, 1), torch.tensor([[math.nan, math.inf, 1e30, 2.0]]))
    estimate.fold(estimate.pending)
    assert all(0 <= nats <= 1000 for nats in estimate.curve.cross_entropy)
