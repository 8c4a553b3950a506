"""Proves that random numbers belong to a sample: a function of (seed, index) alone, however samples are grouped or ordered."""

import pytest
import scipy.stats
import torch

from rdtrain.randomness import SampleRandom

CPU = torch.device("cpu")


def draws(seed, indices):
    """What a step draws, in this order: uniform numbers, then normal ones, then uniform ones again."""
    random = SampleRandom(seed, indices, CPU)
    return torch.cat((random.uniform(3), random.normal(2, 4).flatten(1), random.uniform(2, 2).flatten(1)), dim=1)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[5], [3, 1, 0], [4, 2]]])
def test_rows_are_the_same_for_any_grouping_and_ordering_of_the_samples(groups):
    alone = {index: draws(7, [index])[0] for index in range(6)}
    for group in groups:
        for row, index in zip(draws(7, group), group, strict=True):
            assert torch.equal(row, alone[index])


def test_nothing_depends_on_or_disturbs_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draws(7, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draws(7, [0, 1]), first)


def test_the_same_sample_twice_in_a_batch_gets_the_same_row_twice():
    rows = draws(7, [3, 3])
    assert torch.equal(rows[0], rows[1])


def test_different_indices_and_different_seeds_give_different_rows():
    rows = torch.cat([draws(seed, range(50)) for seed in (0, 1, "0/1", "held-out")])
    assert len({tuple(row.tolist()) for row in rows}) == 200


def test_a_seed_and_an_index_are_not_confused_with_their_neighbours():
    assert not torch.equal(draws(1, [12]), draws(11, [2]))
    assert not torch.equal(draws(1, [2]), draws(2, [1]))


def test_successive_draws_of_one_stream_differ():
    random = SampleRandom(0, [0, 1], CPU)
    assert not torch.equal(random.uniform(8), random.uniform(8))
    assert not torch.equal(random.normal(8), random.normal(8))


def test_uniform_numbers_lie_strictly_inside_the_unit_interval_and_are_uniform():
    uniform = SampleRandom(0, range(20), CPU).uniform(1000)
    assert uniform.shape == (20, 1000) and uniform.dtype == torch.float32
    assert uniform.min() > 0 and uniform.max() < 1
    assert scipy.stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 0.01


def test_a_zero_from_the_generator_does_not_come_out_as_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert (SampleRandom(0, [0], CPU).uniform(4) > 0).all()


def test_first_numbers_are_uniform_and_normal_across_samples():
    random = SampleRandom(0, range(3000), CPU)
    assert scipy.stats.kstest(random.uniform(1)[:, 0].numpy(), "uniform").pvalue > 0.01
    assert scipy.stats.kstest(random.normal(1)[:, 0].numpy(), "norm").pvalue > 0.01


def test_normal_numbers_are_standard_normal():
    normal = SampleRandom(0, range(20), CPU).normal(10, 100)
    assert normal.shape == (20, 10, 100) and normal.dtype == torch.float32
    assert scipy.stats.kstest(normal.flatten().numpy(), "norm").pvalue > 0.01
