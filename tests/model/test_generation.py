"""K-iteration inference: the cache changes nothing, the chain is the one of the paper, for each solver."""

import math

import pytest
import torch

from rdtrain.model.chain import DenoisingChain
from rdtrain.model.generation import Sampling, generate
from rdtrain.model.information import InformationCurve
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.solvers import SOLVERS
from rdtrain.model.text_random import ITERATION, STATE, TextRandom

PROMPT = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def tokens(model, iterations, use_cache=True, sampling=Sampling(), length=12, prompt=PROMPT, seed=1):  # noqa: B008
    return torch.stack(list(generate(model, prompt, length, iterations, NoiseSchedule(NoiseSettings()), sampling, seed, use_cache)), dim=1)


@pytest.mark.parametrize("solver", [None, *SOLVERS])
@pytest.mark.parametrize("iterations", [1, 4, 32])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_and_uncached_generation_give_the_same_tokens(build_model, solver, iterations, temperature):
    """solver None: an unrolled model."""
    model, sampling = build_model(noise_conditioning=solver is not None), Sampling(temperature, solver=solver or "euler")
    assert_the_cache_changes_nothing(model, iterations, sampling, length=5 if iterations == 32 else 12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("iterations", [1, 4, 32])
@pytest.mark.parametrize("self_conditioning, chain_readout", [(True, "coda"), (False, "core"), (True, "core")])
def test_the_cache_changes_nothing_where_iterations_are_told_estimates_or_read_from_the_core(
    build_model, solver, iterations, self_conditioning, chain_readout
):
    model = build_model(True, self_conditioning=self_conditioning, core_readout=True, blocks=2 if iterations == 4 else 1)
    sampling = Sampling(solver=solver, chain_readout=chain_readout)
    assert_the_cache_changes_nothing(model, iterations, sampling, length=3 if iterations == 32 else 5)


def assert_the_cache_changes_nothing(model, iterations, sampling, length=12):
    cached, uncached = (tokens(model, iterations, use_cache, sampling, length) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.unique().numel() > 2  # not one token for ever, which would agree by chance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chain_temperature, chain_top_p", [(1.0, 1.0), (0.6, 0.8)])
@pytest.mark.parametrize("self_conditioning, chain_readout", [(False, "coda"), (True, "coda"), (False, "core"), (True, "core")])
def test_the_first_token_of_a_denoiser_is_drawn_from_a_slow_chain_written_out(
    build_model, solver, chain_temperature, chain_top_p, self_conditioning, chain_readout
):
    """The whole chain for one prompt, in float64 where the model allows, from the formulas of the paper, of EDM and of Bayes."""
    model, prompt, iterations = build_model(True, self_conditioning=self_conditioning, core_readout=True), PROMPT[:1], 6
    width, length = model.config.width, prompt.shape[1]
    random = TextRandom(torch.tensor([1])).at(torch.arange(length).unsqueeze(0))
    eps, random = random.normal(STATE, width), random.last()
    table = model.embedding.weight.detach()
    unit = table / table.norm(dim=-1, keepdim=True)
    edges = NoiseSchedule(NoiseSettings()).edges(iterations)
    sd = 1 / math.sqrt(width)
    e = model.prelude(prompt)
    last, history, told = edges[0] * eps[:, -1], [], None
    for k in range(iterations):
        s, s_next = edges[k], edges[k + 1]
        rows = [unit[prompt[0, i + 1]] + s * eps[0, i] for i in range(length - 1)] + [last[0]]
        z = torch.stack(rows).unsqueeze(0)
        condition = model.condition(torch.full((1, 1), math.log(s) / 4))
        hidden = model.iterate(z / math.sqrt(s**2 + sd**2), e, condition, previous=told)
        estimate = sd**2 / (s**2 + sd**2) * z + s * sd / math.sqrt(s**2 + sd**2) * hidden
        logits = model.readout(estimate / sd, condition)
        if chain_readout == "core" and k < iterations - 1:
            normed = (estimate / sd).double() / ((estimate / sd).double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
            logits = (model.core_scale * (normed * model.core_norm.weight) @ table.double().T).float()
        if self_conditioning:  # every position is told what it thought of its own target
            told = torch.stack([(row.softmax(-1)[:, None] * unit).sum(0) for row in logits[0]]).unsqueeze(0)
        logits = logits[:, -1]
        if k == iterations - 1:
            break
        probability, kept = (logits[0].double() / chain_temperature).softmax(-1), torch.zeros(50, dtype=torch.float64)
        for token in probability.argsort(descending=True):
            if kept.sum() < chain_top_p:
                kept[token] = probability[token]
        probability = kept / kept.sum()
        if solver == "ancestral":
            waits = random.exponential(ITERATION + 2 * k, 50)[0, 0]  # the shortest of waits at rates p is token x with chance p_x
            y = unit[(waits / probability).argmin()].double()
            variance = s_next**2 * (s**2 - s_next**2) / s**2
            mean = (s_next / s) ** 2 * last + (1 - (s_next / s) ** 2) * y
            last = (mean + math.sqrt(variance) * random.normal(ITERATION + 2 * k + 1, width)[:, 0]).float()
            continue
        denoised = probability @ unit.double()
        history.append((-math.log(s), denoised))
        if solver == "multistep" and k > 0:
            (before, old), (now, new) = history[-2:]
            denoised = new + (new - old) * (-math.log(s_next) - now) / 2 / (now - before)
        last = (last + (s_next - s) / s * (last - denoised)).float()
    sampling = Sampling(0.0, 0, 1.0, 0.0, solver, chain_temperature, chain_top_p, chain_readout)
    chain = DenoisingChain(model, NoiseSchedule(NoiseSettings()), iterations, sampling, None, TextRandom(torch.tensor([1])))
    torch.testing.assert_close(chain(prompt), logits, rtol=1e-3, atol=1e-3)
    assert tokens(model, iterations, sampling=sampling, length=1, prompt=prompt)[0, 0] == logits.argmax()


def test_what_is_told_and_where_the_chain_is_read_both_matter(build_model):
    """Each would change the token distribution, and not by rounding: else the comparisons above would prove nothing."""
    model = build_model(True, self_conditioning=True, core_readout=True)

    def logits(chain_readout):
        sampling, random = Sampling(chain_readout=chain_readout), TextRandom(torch.tensor([1, 2]))
        return DenoisingChain(model, NoiseSchedule(NoiseSettings()), 6, sampling, None, random)(PROMPT)

    told, told_by_core = logits("coda"), logits("core")
    torch.nn.init.zeros_(model.estimate_adapter.weight)
    for first, second in ((told, told_by_core), (told, logits("coda")), (logits("coda"), logits("core"))):
        assert (first - second).abs().max() > 0.05


def test_a_chain_that_reads_from_a_core_without_a_readout_is_refused(build_model):
    with pytest.raises(ValueError, match="^chain_readout=core needs a model .*objective.core_readout=true: leave it at coda$"):
        tokens(build_model(True), 4, sampling=Sampling(chain_readout="core"))
    with pytest.raises(ValueError, match="^chain_readout must be coda or core, and it is head$"):
        Sampling(chain_readout="head")


@pytest.mark.parametrize("partition", ["equi_probability", "uniform", "equal_information"])
def test_one_iteration_is_one_pass_over_pure_noise_at_sigma_max(build_model, partition):
    """Whatever the partition; with a sigma_data of 0.5, written out in float64."""
    model, width, sd = build_model(noise_conditioning=True, norm_eps=0.1), 32, 0.5
    schedule = NoiseSchedule(NoiseSettings(partition=partition, sigma_data=sd), InformationCurve.expected(0.002, 80.0))
    (chosen,) = generate(model, PROMPT[:1, :1], 1, 1, schedule, Sampling(0.0), 1)
    z = 80.0 * TextRandom(torch.tensor([1])).at(torch.zeros(1, 1, dtype=torch.long)).normal(STATE, width).double()
    condition, total = model.condition(torch.full((1, 1), math.log(80.0) / 4)), 80.0**2 + sd**2
    hidden = model.iterate((z / math.sqrt(total)).float(), model.prelude(PROMPT[:1, :1]), condition).double()
    estimate = sd**2 / total * z + 80.0 * sd / math.sqrt(total) * hidden
    assert chosen[0] == model.readout((estimate / sd).float(), condition)[0, -1].argmax()


def test_the_seed_decides_the_noise_and_the_draw(build_model):
    model = build_model(noise_conditioning=True)
    assert torch.equal(tokens(model, 4, seed=1), tokens(model, 4, seed=1))
    assert not torch.equal(tokens(model, 4, seed=1), tokens(model, 4, seed=2))


@pytest.mark.parametrize("iterations", [1, 2, 64])
def test_any_number_of_iterations_generates_whatever_the_model_was_trained_for(build_model, iterations):
    out = tokens(build_model(noise_conditioning=True, iterations=32), iterations, length=3)
    assert out.shape == (2, 3) and out.min() >= 0 and out.max() < 50


def test_one_iteration_is_the_same_for_all_solvers(build_model):
    model = build_model(noise_conditioning=True)
    euler, *others = (tokens(model, 1, sampling=Sampling(solver=solver, chain_temperature=0.3)) for solver in SOLVERS)
    assert all(torch.equal(euler, other) for other in others)
    assert not torch.equal(*(tokens(model, 4, sampling=Sampling(solver=solver)) for solver in ("euler", "ancestral")))


@pytest.mark.parametrize("kind", [{}, {"noise_conditioning": True}, {"noise_conditioning": True, "posterior_readout": True}])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_k": 1, "solver": "ancestral"}])
def test_unused_tokens_are_never_drawn(build_model, kind, sampling):
    sampling = Sampling(**sampling) if kind else Sampling(**{**sampling, "solver": "euler"})
    all_used, few_used = (tokens(build_model(**kind, unused_tokens=unused), 3, sampling=sampling, length=6) for unused in (0, 46))
    assert all_used.max() > 3 and few_used.max() <= 3 and len(few_used.unique()) > 1


def test_an_empty_prompt_and_no_iterations_are_refused(build_model):
    model = build_model(noise_conditioning=True)
    with pytest.raises(ValueError, match="prompt"):
        tokens(model, 4, prompt=PROMPT[:, :0])
    with pytest.raises(ValueError, match="iteration"):
        tokens(model, 0)
