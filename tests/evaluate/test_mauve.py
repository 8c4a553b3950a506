"""MAUVE: near one for two samples of one distribution, lower the further they are apart; the scaling moves it as it should."""

import pytest
import torch

compute_mauve = pytest.importorskip("mauve").compute_mauve

from rdtrain.evaluate.mauve import Mauve, MauveSettings, mauve_scores  # noqa: E402
from rdtrain.evaluate.samples import Sample  # noqa: E402


def clouds(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(200, 8, generator=generator) for _ in range(2))
    return one, other + shift * torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0])


def test_mauve_is_near_one_for_one_distribution_and_falls_with_the_distance():
    scores = [mauve_scores(*clouds(shift), MauveSettings())[0] for shift in (0.0, 1.0, 20.0)]
    assert scores[0][1] > 0.9 > scores[1][1] > scores[2][1] and scores[2][1] < 0.05
    same = clouds(0.0)[0]
    assert mauve_scores(same, same, MauveSettings()) == ([1.0, 1.0], 20)
    assert mauve_scores(same, same, MauveSettings(clusters=7))[1] == 7


def test_scores_at_each_scaling_are_those_of_the_authors_package():
    human, written = clouds(1.0)
    found = mauve_scores(human, written, MauveSettings(scalings=[0.2, 5.0, 1.0]))[0]
    package = [compute_mauve(human.numpy(), written.numpy(), mauve_scaling_factor=c, seed=0).mauve for c in (0.2, 5.0, 1.0)]
    assert found == pytest.approx(package, abs=1e-6)


def test_each_set_of_continuations_is_compared_on_its_own_with_human_features_computed_once():
    human, written = clouds(0.0)

    class Features:
        name, calls = "", []

        def features(self, passages, batch, description):
            self.calls.append(len(passages))
            source = {"human": human, "near": written, "far": written + 30}
            return torch.stack([source[one.continuation.split()[0]][int(one.prompt)] for one in passages])

    samples = [
        Sample("m", {}, prompt, number, str(prompt), f"{kind} {prompt}", f"human {prompt}", [], [], [], False, "")
        for prompt in range(200)
        for number, kind in enumerate(("near", "far"))
    ]
    judge = Features()
    mauve = Mauve(judge, MauveSettings(scalings=[5.0]), 32)
    mauve.prepare(samples)
    score = mauve.score(samples)
    near, far = (mauve_scores(human, written + shift, MauveSettings(scalings=[5.0]))[0][0] for shift in (0, 30))
    assert score.mauve == [pytest.approx((near + far) / 2)]
    assert score.standard_deviation == [pytest.approx(abs(near - far) / 2**0.5)]
    assert judge.calls == [200, 400]
