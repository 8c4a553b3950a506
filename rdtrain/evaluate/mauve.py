"""MAUVE (Pillutla et al. 2021, arXiv 2102.01454): how close the distribution of a model's texts is to that of human texts.

Computed by the authors' package on features of our choosing; prompt and continuation are compared with prompt and human
continuation, as is usual. Each set of one continuation a prompt is compared on its own, so both sides have as many texts.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from .reference import Passage, ReferenceModel
from .samples import Sample
from .teacher import human_passage, written_passage


@dataclass
class MauveSettings:
    """scaling: the exponent's factor c of the divergence curve. clusters: of k-means, texts / 10 where it is `auto`. seed: of k-means."""

    scaling: float = 0.2
    clusters: int | str = "auto"
    seed: int = 0


@dataclass
class MauveScore:
    """The mean over sets of continuations, their standard deviation (None of one set), and the number of clusters."""

    mauve: float
    standard_deviation: float | None
    clusters: int


def require_mauve() -> None:
    """UserError when the mauve-text package is not installed."""
    try:
        import mauve  # noqa: F401
    except ImportError:
        raise UserError("MAUVE needs the mauve-text package, which is not installed: pip install rdtrain[mauve]") from None


def mauve_score(human: torch.Tensor, written: torch.Tensor, settings: MauveSettings) -> tuple[float, int]:
    """Features [N, d] and [M, d] -> MAUVE in (0, 1], 1 for the same distribution, and the number of clusters."""
    from mauve import compute_mauve

    result = compute_mauve(
        p_features=human.numpy(), q_features=written.numpy(), mauve_scaling_factor=settings.scaling, num_buckets=settings.clusters,
        seed=settings.seed,
    )
    # Of two equal histograms every point of the curve is (1, 1), and the package, which then orders points by chance, returns 0.75.
    mauve = 1.0 if (result.p_hist == result.q_hist).all() else float(result.mauve)
    return mauve, int(result.num_buckets)


class Mauve:
    """Scores samples; features of human text are computed once."""

    def __init__(self, model: ReferenceModel, settings: MauveSettings, batch: int):
        self.model = model
        self.settings = settings
        self._batch = batch
        self._human: dict[Passage, torch.Tensor] = {}

    def prepare(self, samples: Sequence[Sample]) -> None:
        """The features of the human text, which finds a model that cannot read it before there is anything to lose."""
        new = [passage for passage in dict.fromkeys(map(human_passage, samples)) if passage not in self._human]
        if new:
            self._human.update(zip(new, self.model.features(new, self._batch, "human features")))

    def score(self, samples: Sequence[Sample]) -> MauveScore:
        """Of each set of one continuation a prompt, against the human text after the same prompts."""
        self.prepare(samples)
        written = self.model.features([written_passage(sample) for sample in samples], self._batch, "features")
        scores = []
        for number in sorted({sample.number for sample in samples}):
            places = [place for place, sample in enumerate(samples) if sample.number == number]
            human = torch.stack([self._human[human_passage(samples[place])] for place in places])
            scores.append(mauve_score(human, written[places], self.settings))
        values = [value for value, _ in scores]
        return MauveScore(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, scores[0][1])
