"""Text scored by an independent language model: its NLL of each continuation, given the prompt.

Averages weigh every token (or byte) alike. Standard errors are over prompts, whose continuations are not independent: those of a
ratio of sums, by its linearisation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .reference import Passage, ReferenceModel
from .samples import Sample


@dataclass
class TeacherScore:
    """nll, nll_per_byte: nats per token of the teacher's and per byte of the continuations, with standard errors over prompts.

    tokens: the teacher's, in all. unscored: continuations without a token, which count nowhere. None where nothing was scored, and
    for the error of one prompt.
    """

    nll: float | None
    standard_error: float | None
    nll_per_byte: float | None
    standard_error_per_byte: float | None
    tokens: int
    unscored: int


def ratio_of_sums(amounts: Sequence[float], sizes: Sequence[float]) -> tuple[float | None, float | None]:
    """sum(amounts) / sum(sizes) of independent pairs, and its standard error (Cochran 1977, section 6.4); None where there is none."""
    total, count = sum(sizes), len(sizes)
    if total == 0:
        return None, None
    ratio = sum(amounts) / total
    if count < 2:
        return ratio, None
    squares = sum((amount - ratio * size) ** 2 for amount, size in zip(amounts, sizes))
    return ratio, math.sqrt(count / (count - 1) * squares) / total


def human_passage(sample: Sample) -> Passage:
    """The prompt with the human text that followed it."""
    return Passage(sample.prompt, sample.human, tuple(sample.prompt_ids), tuple(sample.human_ids), sample.tokenizer_hash)


def written_passage(sample: Sample) -> Passage:
    """The prompt with the model's continuation."""
    return Passage(
        sample.prompt, sample.continuation, tuple(sample.prompt_ids), tuple(sample.continuation_ids), sample.tokenizer_hash
    )


class Teacher:
    """Scores samples; human text, which many settings share, once."""

    def __init__(self, model: ReferenceModel, batch: int):
        self.model = model
        self._batch = batch
        self._human: dict[Passage, tuple[float, int]] = {}

    def score(self, samples: Sequence[Sample]) -> TeacherScore:
        """Of the continuations."""
        passages = [written_passage(sample) for sample in samples]
        scores = self.model.nll(passages, self._batch, "samples")
        return _summary([sample.prompt_number for sample in samples], passages, scores)

    def score_human(self, samples: Sequence[Sample]) -> TeacherScore:
        """Of the human text after the same prompts, each once."""
        passages = {sample.prompt_number: human_passage(sample) for sample in samples}
        new = [passage for passage in dict.fromkeys(passages.values()) if passage not in self._human]
        if new:
            self._human.update(zip(new, self.model.nll(new, self._batch, "human text")))
        return _summary(list(passages), list(passages.values()), [self._human[passage] for passage in passages.values()])


def _summary(prompts: list[int], passages: list[Passage], scores: list[tuple[float, int]]) -> TeacherScore:
    """prompts: of each passage the number of its prompt."""
    nll, tokens, size = (dict.fromkeys(prompts, 0) for _ in range(3))
    unscored = 0
    for prompt, passage, (nats, count) in zip(prompts, passages, scores):
        unscored += count == 0
        nll[prompt] += nats
        tokens[prompt] += count
        size[prompt] += len(passage.continuation.encode()) if count else 0
    per_token = ratio_of_sums(list(nll.values()), list(tokens.values()))
    per_byte = ratio_of_sums(list(nll.values()), list(size.values()))
    return TeacherScore(*per_token, *per_byte, sum(tokens.values()), unscored)
