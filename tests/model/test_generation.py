"""K-iteration inference: the cache changes nothing, the chain is the one of the paper, tokens are drawn as asked."""

import math

import pytest
import torch

from rdtrain.model.generation import Sampling, generate
from rdtrain.model.information import InformationCurve
from rdtrain.model.noise import NoiseSchedule, NoiseSettings

PROMPT = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def tokens(model, iterations, use_cache=True, sampling=Sampling(), length=12, prompt=PROMPT, seed=1):  # noqa: B008
    return torch.stack(list(generate(model, prompt, length, iterations, NoiseSchedule(NoiseSettings()), sampling, seed, use_cache)), dim=1)


@pytest.mark.parametrize("denoising", [True, False])
@pytest.mark.parametrize("iterations", [1, 4, 32])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_and_uncached_generation_give_the_same_tokens(build_model, denoising, iterations, temperature):
    model = build_model(noise_conditioning=denoising)
    cached, uncached = (tokens(model, iterations, use_cache, Sampling(temperature)) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.unique().numel() > 2  # not one token for ever, which would agree by chance


def test_the_first_token_of_a_denoiser_is_drawn_from_a_slow_chain_written_out(build_model):
    """The whole chain for one prompt, in float64 where the model allows, from the formulas of the paper and of EDM."""
    model, prompt, iterations = build_model(noise_conditioning=True), PROMPT[:1], 4
    width, length = model.config.width, prompt.shape[1]
    eps = torch.randn(1, length, width, generator=torch.Generator().manual_seed(1))
    table = model.embedding.weight.detach()
    unit = table / table.norm(dim=-1, keepdim=True)
    edges = NoiseSchedule(NoiseSettings()).edges(iterations)
    sd = 1 / math.sqrt(width)
    e = model.prelude(prompt)
    last = edges[0] * eps[:, -1]
    for k in range(iterations):
        s, s_next = edges[k], edges[k + 1] if k + 1 < iterations else 0.0
        rows = [unit[prompt[0, i + 1]] + s * eps[0, i] for i in range(length - 1)] + [last[0]]
        z = torch.stack(rows).unsqueeze(0)
        condition = model.condition(torch.full((1, 1), math.log(s) / 4))
        hidden = model.iterate(z / math.sqrt(s**2 + sd**2), e, condition)
        estimate = sd**2 / (s**2 + sd**2) * z + s * sd / math.sqrt(s**2 + sd**2) * hidden
        logits = model.readout(estimate / sd, condition)[:, -1]
        denoised = logits.double().softmax(-1) @ unit.double()
        last = (last + (s_next - s) / s * (last - denoised)).float()
    assert tokens(model, iterations, sampling=Sampling(0.0), length=1, prompt=prompt)[0, 0] == logits.argmax()


@pytest.mark.parametrize("partition", ["equi_probability", "uniform", "equal_information"])
def test_one_iteration_is_one_pass_over_pure_noise_at_sigma_max(build_model, partition):
    """Whatever the partition; with a sigma_data of 0.5, written out in float64."""
    model, width, sd = build_model(noise_conditioning=True, norm_eps=0.1), 32, 0.5
    schedule = NoiseSchedule(NoiseSettings(partition=partition, sigma_data=sd), InformationCurve.expected(0.002, 80.0))
    (chosen,) = generate(model, PROMPT[:1, :1], 1, 1, schedule, Sampling(0.0), 1)
    z = 80.0 * torch.randn(1, 1, width, generator=torch.Generator().manual_seed(1)).double()
    condition, total = model.condition(torch.full((1, 1), math.log(80.0) / 4)), 80.0**2 + sd**2
    hidden = model.iterate((z / math.sqrt(total)).float(), model.prelude(PROMPT[:1, :1]), condition).double()
    estimate = sd**2 / total * z + 80.0 * sd / math.sqrt(total) * hidden
    assert chosen[0] == model.readout((estimate / sd).float(), condition)[0, -1].argmax()


def test_the_seed_decides_the_noise_and_the_draw(build_model):
    model = build_model(noise_conditioning=True)
    assert torch.equal(tokens(model, 4, seed=1), tokens(model, 4, seed=1))
    assert not torch.equal(tokens(model, 4, seed=1), tokens(model, 4, seed=2))


def test_temperature_top_k_and_top_p_leave_what_they_say():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)

    def drawn(sampling):
        return {sampling.draw(logits, generator).item() for _ in range(400)}

    assert drawn(Sampling()) == {0, 1, 2, 3}
    assert drawn(Sampling(temperature=0)) == {1}
    assert drawn(Sampling(top_k=2)) == {1, 3}
    probability = logits.softmax(-1)[0]  # 0.64 for token 1, 0.24 for token 3
    assert drawn(Sampling(top_p=float(probability[1]) - 0.01)) == {1}
    assert drawn(Sampling(top_p=float(probability[1]) + 0.01)) == {1, 3}


def test_draws_follow_the_distribution_at_a_temperature():
    logits = torch.tensor([[0.5, -1.0, 1.5]])
    draws = Sampling(temperature=0.7).draw(logits.expand(20_000, -1), torch.Generator().manual_seed(0))
    expected = (logits[0].double() / 0.7).softmax(-1)
    assert torch.allclose(draws.bincount(minlength=3).double() / 20_000, expected, atol=0.015)


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5)])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match="must not be negative"):
        Sampling(**bad)


def test_an_empty_prompt_and_no_iterations_are_refused(build_model):
    model = build_model(noise_conditioning=True)
    with pytest.raises(ValueError, match="prompt"):
        tokens(model, 4, prompt=PROMPT[:, :0])
    with pytest.raises(ValueError, match="iteration"):
        tokens(model, 0)
