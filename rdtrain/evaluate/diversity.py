"""How varied text is: the entropy of its tokens, and the share of its n-grams that are distinct.

Both depend on how much text is counted, so samples are always set beside exactly as many human tokens, and sets of one
continuation a prompt are counted one by one and averaged: otherwise five continuations of a prompt would share its words.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .samples import Sample

Tokens = Sequence[int]


@dataclass
class Diversity:
    """Of sets of texts, the mean over the sets.

    unigram_entropy: nats, of the distribution of tokens. distinct: the share of distinct ones among all 1-, 2- and 3-grams.
    tokens: in all sets together.
    """

    unigram_entropy: float
    distinct: list[float]
    tokens: int


def unigram_entropy(texts: Sequence[Tokens]) -> float:
    """Entropy in nats of the token distribution of all texts together; 0 for no tokens."""
    counts = Counter(token for text in texts for token in text)
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def distinct(texts: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams, none of which crosses from one text to the next (Li et al. 2016); 0 where there is none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def diversity(sets: Sequence[Sequence[Tokens]]) -> Diversity:
    """Each set on its own, and the mean."""
    return Diversity(
        unigram_entropy=sum(map(unigram_entropy, sets)) / len(sets),
        distinct=[sum(distinct(texts, n) for texts in sets) / len(sets) for n in (1, 2, 3)],
        tokens=sum(len(text) for texts in sets for text in texts),
    )


def diversity_of(samples: Sequence[Sample]) -> tuple[Diversity, Diversity]:
    """Of the continuations and of the human text after the same prompts, cut to the same lengths."""
    numbers = sorted({sample.number for sample in samples})
    sets = [[sample for sample in samples if sample.number == number] for number in numbers]
    return (
        diversity([[sample.continuation_ids for sample in one] for one in sets]),
        diversity([[sample.human_ids[: len(sample.continuation_ids)] for sample in one] for one in sets]),
    )
