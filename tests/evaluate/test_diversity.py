"""Entropy and distinct n-grams against a slow count, on sets of the same size as the human text's."""

import math
import random

import pytest

from rdtrain.evaluate.diversity import distinct, diversity_of, unigram_entropy
from rdtrain.evaluate.samples import Sample


@pytest.fixture(scope="module")
def sets() -> list[list[list[int]]]:
    """Two sets of 12 texts of unequal lengths, empty and shorter than three tokens among them."""
    draw = random.Random(0)
    return [[[draw.randrange(6) for _ in range(length)] for length in (0, 1, 2, 3, 5, 8, 9, 9, 9, 4, 7, 7)] for _ in range(2)]


def slow_entropy(texts) -> float:
    tokens = sum(texts, [])
    return sum(math.log(len(tokens) / tokens.count(token)) / len(tokens) for token in tokens)


def slow_distinct(texts, n) -> float:
    seen, count = [], 0
    for text in texts:
        for end in range(n, len(text) + 1):
            count += 1
            if text[end - n : end] not in seen:
                seen.append(text[end - n : end])
    return len(seen) / count


def test_entropy_and_distinct_n_grams_are_what_a_slow_loop_counts(sets):
    for texts in sets:
        assert unigram_entropy(texts) == pytest.approx(slow_entropy(texts))
        assert [distinct(texts, n) for n in (1, 2, 3)] == [pytest.approx(slow_distinct(texts, n)) for n in (1, 2, 3)]
    assert unigram_entropy([[3, 3], [3]]) == 0 and unigram_entropy([[]]) == 0 and distinct([[1]], 2) == 0
    assert unigram_entropy([[0, 1], [2, 3]]) == pytest.approx(math.log(4))


def test_samples_are_counted_set_by_set_and_the_human_text_on_as_many_tokens(sets):
    human = [[prompt, *range(10, 19)] for prompt in range(12)]
    samples = [
        Sample("m", {}, prompt, number, "", "", "", [], written, human[prompt], False, "")
        for number, texts in enumerate(sets)
        for prompt, written in enumerate(texts)
    ]
    ours, theirs = diversity_of(samples)
    assert ours.tokens == theirs.tokens == sum(len(text) for texts in sets for text in texts)
    assert ours.unigram_entropy == pytest.approx(sum(map(slow_entropy, sets)) / 2)
    assert ours.distinct[1] == pytest.approx(sum(slow_distinct(texts, 2) for texts in sets) / 2)
    cut = [text[: len(written)] for text, written in zip(human, sets[0])]  # both sets have the same lengths
    assert theirs.unigram_entropy == pytest.approx(slow_entropy(cut))
    assert theirs.distinct[2] == pytest.approx(slow_distinct(cut, 3))
