"""Untied blocks under the denoising objective: a step is one block's on all ranks, and over the steps all is as with one block."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rdtrain.model.information import LEVELS, UNIT
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks
from rdtrain.randomness import SampleRandom

K, B = 8, 4
CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_over_the_steps_iterations_and_noise_levels_are_distributed_as_with_one_block(share):
    """One sequence a step, so that the draws are independent."""
    settings, steps = NoiseSettings(share_at_sigma_max=share), 6000
    drawn = [DiffusionBlocks(settings, K, blocks=B).draw(SampleRandom(1, [step], CPU, step), 8) for step in range(steps)]
    iteration, sigma = (torch.cat(part).flatten().double().numpy() for part in zip(*drawn))
    iteration, pure = iteration.astype(int), sigma == 80.0
    seen = np.append(np.bincount(iteration[~pure], minlength=K), pure.sum())
    expected = np.array([(1 - share) / K] * K + [share]) * steps
    possible = expected > 0
    assert (seen[~possible] == 0).all() and (iteration[pure] == 0).all()
    if share < 1:
        assert scipy.stats.chisquare(seen[possible], expected[possible]).pvalue > 0.01
    _, alone = DiffusionBlocks(settings, K).draw(SampleRandom(2, range(steps), CPU), 8)
    assert scipy.stats.ks_2samp(sigma, alone.flatten().numpy()).pvalue > 0.01


@pytest.mark.parametrize("level_per", ["sequence", "token"])
def test_all_sequences_of_a_step_are_of_its_block_on_every_rank_and_micro_batch(level_per):
    objective, seen = DiffusionBlocks(NoiseSettings(level_per=level_per), K, blocks=B), set()
    for step in range(40):
        parts = [SampleRandom(1, indices, CPU, step) for indices in (range(8), range(8, 11), [99])]
        blocks = {objective.active_block(part) for part in parts}
        assert len(blocks) == 1
        assert {k // (K // B) for part in parts for k in objective.draw(part, 8)[0].flatten().tolist()} == blocks
        seen |= blocks
    assert seen == set(range(B))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_blocks_that_train_side_by_side_are_weighted_as_they_are_drawn(build_model, tokens, share):
    """Each block's loss, metrics and curve, all of them on the same sequences, against sums over blocks that are drawn one a step."""
    settings, model = NoiseSettings(share_at_sigma_max=share, overlap=1.0), build_model(True, iterations=K, blocks=B)
    probabilities = [share + (1 - share) / B] + [(1 - share) / B] * (B - 1)
    loss, units = 0.0, np.zeros((2, LEVELS))
    totals = {"loss": torch.zeros(2), "loss_by_iteration": torch.zeros(2, K)}
    for block, probability in enumerate(probabilities):
        drawn, alone = DiffusionBlocks(settings, K, blocks=B), DiffusionBlocks(settings, K, blocks=B)
        step = next(step for step in range(1000) if drawn.active_block(SampleRandom(1, (), CPU, step)) == block)
        expected = drawn(model, tokens, SampleRandom(1, range(6), CPU, step))
        assert alone.train_only(block) == pytest.approx(B * probability)
        assert alone.active_block(SampleRandom(1, (), CPU, step + 1)) is None  # over the ranks nothing is idle
        found = alone(model, tokens, SampleRandom(1, range(6), CPU, step + 1))
        assert torch.equal(found.value, expected.value)  # what is differentiated has no weight: the engine gives it to what is shared
        for name, total in totals.items():
            total += torch.stack(found.metrics[name])
        loss += probability * expected.value.item()
        units += B * probability * drawn.information.pending.numpy() - alone.information.pending.numpy()
    sums, count = totals["loss"]
    assert (sums / count).item() == pytest.approx(loss) and count == pytest.approx(B * 48)
    assert totals["loss_by_iteration"][1].sum() == pytest.approx(B * 48)
    np.testing.assert_allclose(units * UNIT, 0, atol=1e-3)


def test_only_the_active_core_gets_a_gradient_and_operations_are_those_of_one_core(build_model, tokens):
    model, blocks = build_model(True, iterations=K, blocks=B), set()
    objective = DiffusionBlocks(NoiseSettings(share_at_sigma_max=0.3), K, blocks=B)
    for step in range(12):
        random = SampleRandom(1, range(6), CPU, step)
        model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            objective(model, tokens, random).value.backward()
        trained = {block for block, core in enumerate(model.cores) if any(p.grad is not None for p in core.parameters())}
        assert trained == {objective.active_block(random)}
        assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("cores."))
        unneeded = 2 * 128 * 128 * 6  # the gradient of the noise embedding's features: see test_flops.py
        assert objective.training_flops(model.config, 8) * 6 * 8 - unneeded == pytest.approx(counter.get_total_flops(), rel=1e-12)
        blocks |= trained
    assert blocks == set(range(B))


def test_held_out_likelihood_is_block_0s(build_model, tokens):
    model, objective = build_model(True, blocks=2), DiffusionBlocks(NoiseSettings(), 4, blocks=2)

    def nll():
        return objective.held_out_nll(model, tokens, SampleRandom("validation", range(6), CPU)).detach()

    before = nll()
    with torch.no_grad():
        model.cores[1].adapter.weight.zero_()
        assert torch.equal(nll(), before)
        model.cores[0].adapter.weight.zero_()
        assert not torch.equal(nll(), before)
