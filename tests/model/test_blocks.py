"""Untied blocks in the model: which block runs an iteration, that it alone does, and that generation takes each at its noise levels."""

import pytest
import torch

from rdtrain.model.denoiser import denoise
from rdtrain.model.generation import Sampling, generate
from rdtrain.model.noise import EquiProbabilityPartition, LogNormalNoise, NoiseSettings
from rdtrain.model.recurrent import ModelConfig, ModelSettings

PROMPT = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


@pytest.mark.parametrize("iterations", [1, 2, 3, 8, 12, 50])
def test_an_iteration_is_of_the_block_that_was_trained_at_its_noise_level(iterations):
    """For any K of inference: the level that an iteration runs at lies in the share of the noise that its block was trained on."""
    settings, noise = ModelSettings(iterations=8, blocks=4), LogNormalNoise(NoiseSettings())
    edges = EquiProbabilityPartition(noise, 8).edges[::2]  # each block serves two of the eight
    levels = EquiProbabilityPartition(noise, iterations).levels()
    blocks = [settings.block_of(k, iterations) for k in range(iterations)]
    assert blocks[0] == 0
    for block, level in zip(blocks, levels):
        assert edges[block] * (1 + 1e-9) >= level > edges[block + 1] * (1 + 1e-9)


@pytest.mark.parametrize("block", range(4))
def test_a_block_computes_what_a_model_of_its_core_alone_computes(block, build_model):
    model, alone = build_model(True, blocks=4), build_model(True, seed=9)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("cores.")}
    weights |= {f"cores.0.{name}": tensor for name, tensor in model.cores[block].state_dict().items()}
    alone.load_state_dict(weights)
    z, sigma = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.5], [3.0]])
    actual = denoise(model, z, model.prelude(PROMPT), sigma, block=block)
    assert torch.equal(actual, denoise(alone, z, alone.prelude(PROMPT), sigma))
    assert (actual - denoise(model, z, model.prelude(PROMPT), sigma, block=(block + 1) % 4)).abs().max() > 0.1


def test_generation_runs_the_blocks_in_order_and_its_cache_changes_nothing(build_model):
    model, ran = build_model(True, blocks=4), []
    for block, core in enumerate(model.cores):
        core.register_forward_hook(lambda *_, block=block: ran.append(block))
    cached, uncached = (
        torch.stack(list(generate(model, PROMPT, 4, 8, NoiseSettings(), Sampling(0.0), 1, use_cache))) for use_cache in (True, False)
    )
    assert ran == [0, 0, 1, 1, 2, 2, 3, 3] * 8
    assert torch.equal(cached, uncached) and cached.unique().numel() > 2


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
