"""One process of test_faults.py: every engine and stage leaves steps out that are not finite or far beyond the level, as a plain loop does.

The loss of one sample is not a number, so that one rank alone meets it, and all losses of a later step are multiplied. The reference makes
the same steps but those. An engine's weights are the same to the bit before and after a skipped step; that its moments and step counts are
too, the steps after it tell.
"""

import functools
import math

import torch
from processes import DEVICE, RATE, VOCABULARY, largest_difference, mean_of_ranks, micro_batch, plain_adamw, run_cases

from rdtrain import faults
from rdtrain.data.loader import rank_indices
from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine
from rdtrain.faults import FaultSettings, StepJudge
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import DiffusionBlocks, Loss
from rdtrain.optimization import OptimizerSettings

WAYS = {
    "torch": {"name": "torch"},
    "torch-fused": {"name": "torch"},
    "fsdp": {"name": "fsdp"},
    "fsdp-fused": {"name": "fsdp"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-fused": {"name": "deepspeed", "zero_stage": stage} for stage in (1, 3)},
    **{f"zero-{stage}-offload": {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (1, 3)},
    **{f"zero-{stage}-bf16": {"name": "deepspeed", "zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
}
GLOBAL, MICRO, STEPS = 8, 2, 8
BAD_SAMPLE, SPIKE_STEP = 3 * GLOBAL + 2, 5  # a sample of the second of two ranks in step 3
OPTIMIZER = OptimizerSettings(learning_rate=RATE, weight_decay=0.3, gradient_clipping=0.3, epsilon=1e-4)


class Faulty(DiffusionBlocks):
    """The denoising objective with a bad sample and a bad step."""

    def __call__(self, model, tokens, random):
        loss = super().__call__(model, tokens, random)
        if BAD_SAMPLE in random.indices:
            return Loss(loss.value * math.nan, loss.metrics)
        return Loss(loss.value * 1e4, loss.metrics) if random.indices[0] // GLOBAL == SPIKE_STEP else loss


def build_model() -> RecurrentDepthLM:
    torch.manual_seed(0)
    return RecurrentDepthLM(
        ModelConfig(width=32, heads=4, mlp_width=48, prelude_layers=1, core_layers=1, coda_layers=1, iterations=4, vocab_size=VOCABULARY,
                    noise_conditioning=True)
    )


@functools.cache
def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the steps that count, and the weights at the end."""
    model, objective, losses = build_model().to(DEVICE), Faulty(NoiseSettings(), 4), []
    optimizer = plain_adamw(model.parameters(), model.embedding.weight, OPTIMIZER)
    for step in range(STEPS):
        if step in (BAD_SAMPLE // GLOBAL, SPIKE_STEP):
            continue
        loss = objective(model, *micro_batch(range(step * GLOBAL, (step + 1) * GLOBAL), step)).value
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check(way: str, world: World) -> None:
    """AssertionError where an engine does not skip the two steps, skips others, or is changed by them."""
    settings = EngineSettings(**{"precision": "fp32"} | WAYS[way])
    engine = build_engine(settings, build_model(), Faulty(NoiseSettings(), 4), OPTIMIZER, MICRO, GLOBAL // MICRO // world.size, world)
    if way.endswith("fused"):  # as on CUDA: torch's kernel is told by a tensor
        engine._optimizer.defaults["fused"] = True
        for group in engine._optimizer.param_groups:
            group["fused"] = True
    judge = StepJudge(FaultSettings(), 1, world)
    right, weights = reference()
    found = []
    for step in range(STEPS):
        before = {name: tensor.clone() for name, tensor in engine.weights().items()}
        batches = (micro_batch(indices, step) for indices in rank_indices(step, GLOBAL, world.size, world.rank, MICRO))
        values = [loss.value.item() for loss in engine.train_step(batches, RATE, None, judge)]
        judge.note(step + 1, RATE)
        loss = mean_of_ranks(values, world)
        same = all(tensor.equal(before[name]) for name, tensor in engine.weights().items())
        bad = step in (BAD_SAMPLE // GLOBAL, SPIKE_STEP)
        assert bool(judge.skipped) == bad, f"step {step} with loss {loss}: skipped is {judge.skipped}"
        if world.is_main:
            assert same == bad, f"step {step}: weights are the same: {same}"
        if not bad:
            found.append(loss)
    exact = settings.precision == "fp32"
    assert all(abs(a - b) < (1e-5 if exact else 0.02) for a, b in zip(found, right, strict=True)), f"{found}\n{right}"
    difference = largest_difference(engine.weights(), weights)
    assert difference < (2e-6 if exact else 3 * RATE * OPTIMIZER.embedding_scale), f"weights are off by {difference}"
    assert [step.step for step in judge.read(last_too=True)] == [BAD_SAMPLE // GLOBAL + 1, SPIKE_STEP + 1]


if __name__ == "__main__":
    faults.SETTLED = 2  # levels to compare with after two steps
    run_cases(WAYS, check)
