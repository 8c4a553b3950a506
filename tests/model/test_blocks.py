"""Untied blocks in the model: which block runs an iteration, that it alone does, and that generation takes each at its noise levels."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rdtrain.model.denoiser import denoise
from rdtrain.model.generation import Sampling, generate
from rdtrain.model.information import InformationCurve
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.recurrent import ModelConfig, ModelSettings

PROMPT = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


@pytest.mark.parametrize("partition", ["equi_probability", "uniform", "equal_information"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 8, 12, 50])
def test_an_iteration_is_of_the_block_that_was_trained_at_its_noise_level(iterations, partition):
    """For any K of inference: the level that an iteration runs at lies in the share of the noise that its block was trained on."""
    settings, noise = ModelSettings(iterations=8, blocks=4), NoiseSettings(partition=partition)
    schedule = NoiseSchedule(noise, InformationCurve.expected(noise.sigma_min, noise.sigma_max))
    edges = schedule.edges(8)[::2]  # each block serves two of the eight
    levels = schedule.levels(iterations)
    blocks = [settings.block_of(k, iterations) for k in range(iterations)]
    assert blocks[0] == 0
    for block, level in zip(blocks, levels):
        assert edges[block] * (1 + 1e-9) >= level > edges[block + 1] * (1 + 1e-9)


@pytest.mark.parametrize("block", range(4))
def test_a_block_computes_what_a_model_of_its_core_alone_computes(block, build_model):
    model, alone = build_model(True, blocks=4, self_conditioning=True), build_model(True, seed=9, self_conditioning=True)
    torch.nn.init.normal_(model.estimate_adapter.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("cores.")}
    weights |= {f"cores.0.{name}": tensor for name, tensor in model.cores[block].state_dict().items()}
    alone.load_state_dict(weights)
    z, previous = torch.randn(2, 2, 5, 32, generator=torch.Generator().manual_seed(0))

    def logits(model, block=0, previous=previous):
        return denoise(model, z, model.prelude(PROMPT), torch.tensor([[0.5], [3.0]]), 0.2, previous=previous, block=block)

    actual = logits(model, block)
    assert torch.equal(actual, logits(alone))
    assert (actual - logits(model, (block + 1) % 4)).abs().max() > 0.1 < (actual - logits(model, block, None)).abs().max()


def test_generation_runs_the_blocks_in_order_and_its_cache_changes_nothing(build_model):
    model, noise, ran = build_model(True, blocks=4), NoiseSchedule(NoiseSettings()), []
    for block, core in enumerate(model.cores):
        core.register_forward_hook(lambda *_, block=block: ran.append(block))
    cached, uncached = (
        torch.stack(list(generate(model, PROMPT, 4, 8, noise, Sampling(0.0), 1, use_cache))) for use_cache in (True, False)
    )
    assert ran == [0, 0, 1, 1, 2, 2, 3, 3] * 8
    assert torch.equal(cached, uncached) and cached.unique().numel() > 2


def test_parts_are_compiled_once_for_all_depths_and_blocks_and_compute_the_same(build_model, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model, e = build_model(iterations=12, blocks=12), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

    def run(depth: int, block: int) -> torch.Tensor:
        state = e
        for _ in range(depth):
            state = model.iterate(state, e, block=block)
        return model.loss(state, PROMPT)[1]

    ways = [(1, 0), *((2, block) for block in range(12)), (9, 3)]
    expected = [run(*way) for way in ways]
    model.compile_parts()
    counts = []
    for way, losses in zip(ways, expected):
        torch.testing.assert_close(run(*way), losses)
        counts.append(counter.frame_count)
    assert counts[0] >= 2 and counts[-1] == counts[1] <= 4, f"compiled graphs after each pass: {counts}"


def test_blocks_start_as_one_core_does_but_each_with_weights_of_its_own(build_model):
    one, four = build_model(True, perturbed=False, width=128), build_model(True, perturbed=False, width=128, blocks=4)
    expected = dict(one.cores[0].named_parameters())
    for core in four.cores:
        for name, parameter in core.named_parameters():
            assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.05)
    assert not torch.equal(four.cores[0].adapter.weight, four.cores[1].adapter.weight)


def test_a_number_of_blocks_that_does_not_divide_the_iterations_is_refused():
    with pytest.raises(ValueError, match="^blocks must divide iterations, and 3 does not divide 32$"):
        ModelSettings(blocks=3)
    with pytest.raises(ValueError, match="blocks must be at least 1, and it is 0"):
        ModelConfig(blocks=0, vocab_size=50)
