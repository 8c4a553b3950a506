"""Proves the noise levels right: distribution and samples against scipy's truncated normal, the partition into iterations and
its overlap against scipy and hand computation, EDM's preconditioning against float64 formulas and for its unit variances."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rdtrain.model.information import InformationCurve
from rdtrain.model.noise import LogNormalNoise, NoiseSchedule, NoiseSettings, Preconditioning, edm_weight

PAPER = NoiseSettings(p_mean=-1.2, p_std=1.2)
OURS = NoiseSettings()
NARROW = NoiseSettings(p_mean=0.3, p_std=0.7, sigma_min=0.05, sigma_max=9.0)
ALL_PARTITIONS = pytest.mark.parametrize("partition", ["equi_probability", "uniform", "equal_information"])
ALL_SETTINGS = pytest.mark.parametrize("settings", [PAPER, OURS, NARROW], ids=["paper", "ours", "narrow"])


def schedule_of(partition, **settings):
    """Levels of any partition; the information curve is the one that is expected before training."""
    settings = NoiseSettings(partition=partition, **settings)
    return NoiseSchedule(settings, InformationCurve.expected(settings.sigma_min, settings.sigma_max))


def log_truncnorm(settings, low=None, high=None):
    """scipy's distribution of ln(sigma), truncated to [low, high]."""
    low, high = low or settings.sigma_min, high or settings.sigma_max
    ends = [(math.log(end) - settings.p_mean) / settings.p_std for end in (low, high)]
    return scipy.stats.truncnorm(*ends, loc=settings.p_mean, scale=settings.p_std)


@ALL_SETTINGS
def test_cdf_is_that_of_the_truncated_normal_of_log_sigma(settings):
    noise, expected = LogNormalNoise(settings), log_truncnorm(settings)
    for sigma in np.geomspace(settings.sigma_min, settings.sigma_max, 41):
        assert noise.cdf(sigma) == pytest.approx(expected.cdf(math.log(sigma)), rel=1e-9, abs=1e-12)


@ALL_SETTINGS
def test_quantile_is_that_of_the_truncated_normal_of_log_sigma(settings):
    noise, expected = LogNormalNoise(settings), log_truncnorm(settings)
    for q in (1e-6, 0.001, 0.1, 0.3, 0.5, 0.77, 0.999, 1 - 1e-6):
        assert noise.quantile(q) == pytest.approx(math.exp(expected.ppf(q)), rel=1e-8)


@ALL_SETTINGS
def test_quantiles_of_zero_and_one_are_the_ends_exactly(settings):
    noise = LogNormalNoise(settings)
    assert noise.quantile(0.0) == settings.sigma_min
    assert noise.quantile(1.0) == settings.sigma_max


@pytest.mark.parametrize(
    "low, high",
    [(0.002, 80.0), (0.3, 0.9), (0.002, 0.0021), (0.002, 0.01), (79.0, 80.0), (10.0, 80.0)],
    ids=["whole", "middle", "sliver at the low end", "low end", "sliver at the high end", "high end"],
)
def test_samples_follow_the_truncated_normal_of_their_interval_and_stay_inside(low, high):
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1)).clamp(min=2**-25)
    samples = LogNormalNoise(OURS).sample(uniform, torch.full((count,), low), torch.full((count,), high))
    assert samples.dtype == torch.float32 and samples.shape == (count,)
    assert samples.min() >= torch.tensor(low) and samples.max() <= torch.tensor(high)
    test = scipy.stats.kstest(samples.double().log().numpy(), log_truncnorm(OURS, low, high).cdf)
    assert test.pvalue > 0.01, test


def test_the_most_extreme_uniform_numbers_give_samples_inside_their_interval():
    uniform = torch.tensor([2.0**-25, 1 - 2.0**-24]).repeat(3)
    low = torch.tensor([0.002, 0.002, 0.002, 0.002, 60.0, 60.0])
    high = torch.tensor([80.0, 80.0, 0.003, 0.003, 80.0, 80.0])
    samples = LogNormalNoise(OURS).sample(uniform, low, high)
    assert samples.isfinite().all()
    assert (samples >= low).all() and (samples <= high).all()


def test_each_sample_uses_its_own_interval_and_grows_with_its_uniform_number():
    low, high = torch.tensor([0.01, 0.5, 5.0]), torch.tensor([0.02, 1.0, 50.0])
    noise = LogNormalNoise(OURS)
    lower, upper = (noise.sample(torch.full((3,), u), low, high) for u in (0.25, 0.75))
    assert (low < lower).all() and (lower < upper).all() and (upper < high).all()
    expected = [math.exp(log_truncnorm(OURS, a, b).ppf(0.25)) for a, b in zip(low.tolist(), high.tolist())]
    np.testing.assert_allclose(lower.numpy(), expected, rtol=1e-6)


@ALL_SETTINGS
@pytest.mark.parametrize("iterations", [1, 2, 8, 32])
def test_edges_are_scipys_quantiles_and_fall_from_sigma_max_to_sigma_min(settings, iterations):
    edges = NoiseSchedule(settings).edges(iterations)
    expected = np.exp(log_truncnorm(settings).ppf(np.linspace(1, 0, iterations + 1)))
    np.testing.assert_allclose(edges, expected, rtol=1e-8)
    assert edges[0] == settings.sigma_max and edges[-1] == settings.sigma_min


@ALL_SETTINGS
def test_every_interval_without_overlap_holds_the_same_probability(settings):
    iterations = 8
    settings = NoiseSettings(settings.p_mean, settings.p_std, settings.sigma_min, settings.sigma_max, overlap=0.0)
    schedule, expected = NoiseSchedule(settings), log_truncnorm(settings)
    for k in range(1, iterations + 1):
        low, high = schedule.intervals(iterations)[k - 1]
        assert expected.cdf(math.log(high)) - expected.cdf(math.log(low)) == pytest.approx(1 / iterations, abs=1e-9)


@pytest.mark.parametrize("partition", ["equi_probability", "uniform"])
def test_iteration_one_owns_the_highest_noise_and_the_last_the_lowest(partition):
    schedule = schedule_of(partition)
    intervals = schedule.intervals(8)
    assert intervals[0][1] == 80.0 and intervals[-1][0] == 0.002
    for (low, high), (next_low, next_high) in zip(intervals, intervals[1:]):
        assert next_low < low and next_high < high
        assert low < next_high, "neighbours overlap"


def test_overlap_widens_intervals_as_computed_by_hand_and_is_clipped_at_the_ends():
    # Symmetric around sigma = 1, so the edges are 16, 1 and 1/16; (16 / 1)^0.25 = 2.
    settings = NoiseSettings(p_mean=0.0, p_std=1.0, sigma_min=1 / 16, sigma_max=16.0, overlap=0.25)
    schedule = NoiseSchedule(settings)
    assert schedule.intervals(2)[0] == pytest.approx((0.5, 16.0))
    assert schedule.intervals(2)[1] == pytest.approx((1 / 16, 2.0))


@ALL_SETTINGS
def test_overlap_follows_the_papers_formula_in_every_interval(settings):
    iterations, gamma = 6, settings.overlap
    schedule = NoiseSchedule(settings)
    edges = np.exp(log_truncnorm(settings).ppf(np.linspace(1, 0, iterations + 1)))
    assert gamma == 0.1
    for k in range(1, iterations + 1):
        high, low = edges[k - 1], edges[k]
        factor = (high / low) ** gamma
        expected = (low / factor if k < iterations else settings.sigma_min, high * factor if k > 1 else settings.sigma_max)
        assert schedule.intervals(iterations)[k - 1] == pytest.approx(expected, rel=1e-8)


@ALL_PARTITIONS
@pytest.mark.parametrize("iterations", [1, 2, 8, 32, 64, 200])
def test_levels_start_at_sigma_max_fall_strictly_and_end_at_zero(iterations, partition):
    schedule = schedule_of(partition)
    levels = schedule.levels(iterations)
    assert len(levels) == iterations + 1
    assert levels[0] == 80.0 and levels[-1] == 0.0
    assert all(level > following for level, following in zip(levels, levels[1:]))
    for k in range(1, iterations + 1):
        low, high = schedule.intervals(iterations)[k - 1]
        assert low < levels[k - 1] <= high, "an iteration runs at a level that it is trained on"


@ALL_PARTITIONS
def test_one_iteration_owns_the_whole_range(partition):
    schedule = schedule_of(partition)
    assert schedule.intervals(1)[0] == (0.002, 80.0)
    assert schedule.levels(1) == [80.0, 0.0]


def test_uniform_edges_are_evenly_spaced_in_the_logarithm_by_hand():
    schedule = schedule_of("uniform", sigma_min=0.01, sigma_max=100.0, overlap=0.0)
    assert schedule.edges(4) == pytest.approx([100, 10, 1, 0.1, 0.01])
    assert schedule.intervals(4)[1] == pytest.approx((1, 10))


def test_equal_information_without_a_curve_is_refused():
    with pytest.raises(ValueError, match="need the curve that is learned in training"):
        NoiseSchedule(NoiseSettings(partition="equal_information")).levels(4)


def test_samples_far_above_the_mean_keep_their_distribution():
    """Twenty standard deviations out the cdf is 1 in float64; an exponential tail is left, which is not stuck at either end."""
    settings, count = NoiseSettings(p_mean=-1.0, p_std=0.2, sigma_max=80.0), 5000
    uniform = torch.linspace(0.5 / count, 1 - 0.5 / count, count)
    samples = LogNormalNoise(settings).sample(uniform, torch.full((count,), 20.0), torch.full((count,), 80.0))
    normal = (samples.double().log() + 1) / 0.2
    low, high = (math.log(20) + 1) / 0.2, (math.log(80) + 1) / 0.2
    expected = scipy.stats.truncnorm(low, high).ppf(uniform.double().numpy())
    np.testing.assert_allclose(normal.numpy(), expected, rtol=1e-6)


def test_sigma_data_is_the_targets_own_unless_it_is_set():
    assert NoiseSchedule(NoiseSettings()).sigma_data(512) == pytest.approx(512**-0.5, rel=1e-12)
    assert NoiseSchedule(NoiseSettings(sigma_data=0.5)).sigma_data(512) == 0.5


@pytest.mark.parametrize("sd", [0.5, 1 / math.sqrt(512)])
def test_the_weight_makes_up_for_c_out(sd):
    """EDM's table 1 in float64; its purpose is that weight * c_out^2 is 1 at every level."""
    sigma = torch.tensor([0.002, 0.05, 0.7, 80.0])
    s, weight = sigma.double().numpy(), edm_weight(sigma, sd)
    np.testing.assert_allclose(weight.numpy(), (s**2 + sd**2) / (s * sd) ** 2, rtol=2e-6)
    np.testing.assert_allclose((weight * Preconditioning.at(sigma, sd).c_out.square()).numpy(), 1, rtol=1e-5)


@pytest.mark.parametrize("sd", [1 / math.sqrt(32), 1 / math.sqrt(512), 1 / math.sqrt(5280), 0.5])
def test_preconditioning_equals_the_float64_formulas(sd):
    sigma = torch.tensor([[0.002, 0.05], [0.7, 80.0]])
    s = sigma.double().numpy()
    scale = Preconditioning.at(sigma, sd)
    expected = {
        "c_skip": sd**2 / (s**2 + sd**2),
        "c_out": s * sd / np.sqrt(s**2 + sd**2),
        "c_in": 1 / np.sqrt(s**2 + sd**2),
        "c_noise": np.log(s) / 4,
    }
    for name, value in expected.items():
        actual = getattr(scale, name)
        assert actual.dtype == torch.float32 and actual.shape == sigma.shape
        np.testing.assert_allclose(actual.numpy(), value, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.125, 1.0, 80.0])
def test_core_input_and_effective_target_have_unit_variance_per_component_at_every_level(sigma):
    width, rows = 64, 20_000
    generator = torch.Generator().manual_seed(2)
    y = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)
    z = y + sigma * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    scale = Preconditioning.at(torch.tensor(sigma), 1 / math.sqrt(width))
    core_input = scale.c_in.double() * z
    target = (y - scale.c_skip.double() * z) / scale.c_out.double()
    # 1.28 million components: the standard error of a variance is 0.0013.
    assert core_input.square().mean().item() == pytest.approx(1, abs=0.01)
    assert target.square().mean().item() == pytest.approx(1, abs=0.01)
    assert core_input.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_min": -1.0}, "sigma_min"),
        ({"sigma_min": 80.0}, "sigma_min"),
        ({"sigma_max": 0.001}, "sigma_max"),
        ({"p_std": 0.0}, "p_std"),
        ({"p_std": -1.2}, "p_std"),
        ({"overlap": -0.1}, "overlap"),
        ({"share_at_sigma_max": -0.1}, "share_at_sigma_max"),
        ({"share_at_sigma_max": 1.1}, "share_at_sigma_max"),
        ({"sigma_data": 0.0}, "sigma_data"),
    ],
)
def test_bad_settings_are_refused_by_a_sentence_that_names_the_fault_and_the_value(change, named):
    with pytest.raises(ValueError, match=named) as error:
        NoiseSettings(**change)
    assert str(next(iter(change.values()))) in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["p_mean", "p_std", "sigma_max", "overlap", "sigma_data"])
def test_settings_that_are_no_finite_number_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        NoiseSettings(**{name: value})


@pytest.mark.parametrize("change", [{"overlap": 0.0}, {"share_at_sigma_max": 0.0}, {"share_at_sigma_max": 1.0}])
def test_the_borders_of_what_is_allowed_are_allowed(change):
    settings = NoiseSettings(**change)
    assert getattr(settings, next(iter(change))) == next(iter(change.values()))
