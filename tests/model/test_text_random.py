"""Random numbers of texts: SplitMix64 as published, of the right laws, and a function of seed, position and purpose alone."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import expon, kstest, norm, uniform

from rdtrain.model.text_random import TextRandom, output, row_seeds

WORD = 2**64 - 1


def splitmix64(state):
    """The generator as its authors wrote it, in Python's whole numbers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & WORD
        word = state
        word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & WORD
        word = ((word ^ word >> 27) * 0x94D049BB133111EB) & WORD
        yield word ^ word >> 31


def nth(start, index):
    return next(word for number, word in enumerate(splitmix64(start)) if number == index)


def test_outputs_are_splitmix64s():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [nth(1234567, index) for index in range(5)] == published
    assert [word % 2**64 for word in output(torch.tensor(1234567), torch.arange(5)).tolist()] == published


def test_numbers_are_the_halves_of_the_outputs_of_a_seeds_positions_purpose():
    seeds, place, purpose, count = [5, 2**64 - 3], [0, 7], 3, 5
    random = TextRandom(row_seeds(seeds, 2)).at(torch.tensor([place]))
    drawn, waits = random.normal(purpose, count), random.exponential(purpose, count)
    for row, seed in enumerate(seeds):
        for column, position in enumerate(place):
            start = nth(nth(seed, position), purpose)
            words = [nth(start, index) for index in range(3)]
            high, low = [(word >> 32) + 0.5 for word in words], [word & 0xFFFFFFFF for word in words]
            polar = [(math.sqrt(-2 * math.log(one / 2**32)), 2 * math.pi * two / 2**32) for one, two in zip(high, low)]
            expected = [r * math.cos(a) for r, a in polar] + [r * math.sin(a) for r, a in polar]
            np.testing.assert_allclose(drawn[row, column].numpy(), expected[:count], rtol=1e-5, atol=1e-5)
            halves = [*high, *(one + 0.5 for one in low)][:count]
            np.testing.assert_allclose(waits[row, column].numpy(), [-math.log1p(-one / 2**32) for one in halves], rtol=1e-5)


@pytest.mark.parametrize("kind, law", [("normal", norm), ("uniform", uniform), ("exponential", expon)])
def test_numbers_follow_their_law_across_seeds_positions_and_purposes(kind, law):
    random = TextRandom(torch.arange(200)).at(torch.arange(10).unsqueeze(0))
    first, second = (getattr(random, kind)(purpose, 20) for purpose in (0, 1))
    assert kstest(first.flatten().numpy(), law.cdf).pvalue > 0.01
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[..., 1:], first[..., :-1])):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.02  # five standard deviations are 0.025


def test_a_row_draws_the_same_in_any_batch():
    whole = TextRandom(row_seeds(10, 4)).at(torch.arange(6).unsqueeze(0))
    alone = TextRandom(row_seeds(12, 1)).at(torch.tensor([[4]]))
    assert torch.equal(whole.normal(2, 9)[2:3, 4:5], alone.normal(2, 9))
    with pytest.raises(ValueError, match="^a batch of 3 texts needs as many seeds, and 2 are given: "):
        row_seeds([1, 2], 3)
