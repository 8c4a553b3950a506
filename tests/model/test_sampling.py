"""Tokens are drawn as asked: what temperature, top-k, top-p and min-p leave, how often each token comes, and what is refused."""

import math

import pytest
import torch

from rdtrain.model.sampling import Sampling
from rdtrain.model.solvers import draw_tokens
from rdtrain.model.text_random import TextRandom


def random(rows):
    """The random numbers of one position of so many texts."""
    return TextRandom(torch.arange(rows)).at(torch.zeros(1, 1, dtype=torch.long))


def test_temperature_top_k_top_p_and_min_p_leave_what_they_say():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])

    def drawn(**settings):
        return set(Sampling(**settings).draw(logits.expand(400, -1), random(400)).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0) == drawn(temperature=1e-320) == {1}
    assert drawn(top_k=2) == {1, 3}
    probability = logits.softmax(-1)[0]  # 0.64 for token 1, 0.24 for token 3
    assert drawn(top_p=float(probability[1]) - 0.01) == {1}
    assert drawn(top_p=float(probability[1]) + 0.01) == {1, 3}
    # Token 3 is exp(-1) = 0.37 times as likely as token 1, and at temperature 2 exp(-1/2) = 0.61 times.
    assert drawn(min_p=0.38) == {1} and drawn(min_p=0.36) == {1, 3}
    assert drawn(min_p=0.62, temperature=2.0) == {1} and drawn(min_p=0.6, temperature=2.0) == {1, 3}
    assert drawn(min_p=1.0) == {1}


def test_draws_follow_the_distribution_at_a_temperature():
    logits = torch.tensor([[0.5, -1.0, 1.5]])
    draws = Sampling(temperature=0.7).draw(logits.expand(20_000, -1), random(20_000))
    expected = (logits[0].double() / 0.7).softmax(-1)
    assert torch.allclose(draws.bincount(minlength=3).double() / 20_000, expected, atol=0.015)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((100_000, 3), -torch.inf)
    logits[:, 1] = -3e38
    assert draw_tokens(logits, random(100_000).exponential(1, 3)[:, 0]).eq(1).all()


def test_the_chains_logits_are_tempered_and_cut_to_top_p():
    logits = torch.tensor([[[2.0, 0.5, 1.0, -1.0]]]).bfloat16()
    settings = Sampling(temperature=9.0, top_k=1, min_p=1.0, chain_temperature=0.5, chain_top_p=0.9)
    odds = [math.exp(value / 0.5) for value in (2.0, 0.5, 1.0, -1.0)]  # 0.84, 0.04, 0.11, 0.002: the first and the third make up 0.9
    probability = settings.chain_logits(logits).softmax(-1)[0, 0]
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, torch.tensor([odds[0], 0, odds[2], 0]) / (odds[0] + odds[2]))
    assert Sampling(chain_temperature=0).chain_logits(torch.ones(2, 4)).softmax(-1).tolist() == [[1, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5),
        dict(min_p=-0.1), dict(min_p=1.1), dict(solver="heun"), dict(chain_temperature=-1), dict(chain_top_p=0), dict(chain_top_p=math.nan),
        dict(exit="soon"), dict(exit_threshold=0.1), dict(exit_minimum=0), dict(caches=-1), dict(chain_top_k=-1),
        dict(cache_order="random"),
    ],
)
def test_impossible_sampling_is_refused(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"^{name} must .*it is {value}"):
        Sampling(**bad)
