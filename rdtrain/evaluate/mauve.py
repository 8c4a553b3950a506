"""MAUVE (Pillutla et al. 2021, arXiv 2102.01454): how close the distribution of a model's texts is to that of human texts.

Computed by the authors' package on features of our choosing; prompt and continuation are compared with prompt and human
continuation, as is usual. Each set of one continuation a prompt is compared on its own, so both sides have as many texts.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import UserError
from .reference import Passage, ReferenceModel
from .samples import Sample
from .teacher import human_passage, written_passage


@dataclass
class MauveSettings:
    """scalings: the exponent's factors c of the divergence curve, 0.2 in DiffusionBlocks and 5 in the authors' package; at 0.2 all but
    distant distributions are at 0.999. clusters: of k-means, texts / 10 where it is `auto`. seed: of k-means."""

    scalings: list[float] = field(default_factory=lambda: [0.2, 5.0])
    clusters: int | str = "auto"
    seed: int = 0


@dataclass
class MauveScore:
    """For each scaling the mean over sets of continuations and their standard deviation (None of one set); the number of clusters."""

    mauve: list[float]
    standard_deviation: list[float | None]
    clusters: int


def require_mauve() -> None:
    """UserError when the mauve-text package is not installed."""
    try:
        import mauve  # noqa: F401
    except ImportError:
        raise UserError("MAUVE needs the mauve-text package, which is not installed: pip install rdtrain[mauve]") from None


def mauve_scores(human: torch.Tensor, written: torch.Tensor, settings: MauveSettings) -> tuple[list[float], int]:
    """Features [N, d] and [M, d] -> MAUVE in (0, 1] at each scaling, 1 for the same distribution, and the number of clusters."""
    from mauve import compute_mauve

    first = settings.scalings[0]
    result = compute_mauve(
        p_features=human.numpy(), q_features=written.numpy(), mauve_scaling_factor=first, num_buckets=settings.clusters, seed=settings.seed
    )
    # The curve's points are exp(-c KL), so at another c they are powers of these, and the clusters need not be found again.
    scores = [_area(result.divergence_curve ** (scaling / first)) for scaling in settings.scalings]
    # Of two equal histograms every point of the curve is (1, 1), where the order of points would be chance.
    return [1.0] * len(scores) if (result.p_hist == result.q_hist).all() else scores, int(result.num_buckets)


def _area(curve: np.ndarray) -> float:
    """Under a divergence curve [points, 2], the mean over its two axes, as the authors' package takes it."""
    ordered = [(curve[curve[:, axis].argsort()], axis) for axis in (0, 1)]
    return float(np.mean([np.trapezoid(points[:, 1 - axis], points[:, axis]) for points, axis in ordered]))


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
            scores.append(mauve_scores(human, written[places], self.settings))
        of_scalings = list(zip(*(values for values, _ in scores)))
        spread = [statistics.stdev(values) if len(values) > 1 else None for values in of_scalings]
        return MauveScore([statistics.mean(values) for values in of_scalings], spread, scores[0][1])
