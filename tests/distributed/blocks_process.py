"""One process of test_blocks.py: trains untied blocks on every engine, stage and precision that may, and notes each that was right.

A step trains one block. The reference is a loop that gives the shared parameters and each block an AdamW of its own and steps only
two of these, so that nothing can touch an idle block. What else is checked is exact: the groups of idle blocks, weights, moments and
step counts, are the same to the bit before and after each step, and a run that was saved and loaded goes on bit for bit.
`short` offloads the optimizer in fp32 with clipping alone, trains without clipping or in bf16 where the weights are sharded and as ZeRO-1
alone, and has clipping wherever it trains in bf16; `full` has all of it.
"""

import functools
import itertools
import sys

import torch
from processes import (
    ARGUMENTS,
    DEVICE,
    RATE,
    VOCABULARY,
    assert_norms_by_part,
    copy_of_weights,
    drawn,
    largest_difference,
    mean_of_ranks,
    micro_batch,
    norms_by_part,
    plain_adamw,
    run_cases,
    whole_snapshot,
)
from torch.distributed.tensor import DTensor

from rdtrain.data.loader import rank_indices
from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine, deepspeed_config
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import DiffusionBlocks
from rdtrain.optimization import OptimizerSettings

WAYS = {
    "torch": {"name": "torch"},
    "fsdp": {"name": "fsdp"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-offload": {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
}
GLOBAL, MICRO, STEPS, BLOCKS = 8, 2, 7, 3


def build_model() -> RecurrentDepthLM:
    torch.manual_seed(0)
    return RecurrentDepthLM(
        ModelConfig(width=32, heads=4, mlp_width=48, prelude_layers=1, core_layers=1, coda_layers=1, iterations=6, blocks=BLOCKS,
                    vocab_size=VOCABULARY, noise_conditioning=True)
    )


def snapshot(engine) -> list[tuple[int | None, list[torch.Tensor]]]:
    """Each group's block, and its weights, moments and step counts as this rank's optimizer holds them: zeros before the first step."""
    groups = []
    for group, weights in optimizer_groups(engine):
        tensors = []
        for weight in weights:
            state = engine._optimizer.state.get(weight) or {"step": torch.zeros(()), "exp_avg": weight * 0, "exp_avg_sq": weight * 0}
            values = [weight.detach(), *(state[name] for name in ("step", "exp_avg", "exp_avg_sq"))]
            tensors += [(value.to_local() if isinstance(value, DTensor) else value).clone() for value in values]
        groups.append((group["block"], tensors))
    return groups


def optimizer_groups(engine) -> list[tuple[dict, list[torch.Tensor]]]:
    """The groups, each with what it steps; ZeRO-3 fills them in only for the time of a step."""
    zero, groups = getattr(getattr(engine, "_engine", None), "optimizer", None), engine._optimizer.param_groups
    stage_3 = hasattr(zero, "_set_fp32_optimizer_param_groups")
    if stage_3:
        zero._set_fp32_optimizer_param_groups()
    filled = [(group, list(group["params"])) for group in groups]
    if stage_3:
        zero._clear_fp32_optimizer_param_groups()
    return filled


def identical(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Wherever they lie: a step count of zero is the snapshot's own."""
    return len(first) == len(second) and all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(first, second))


def build_objective() -> DiffusionBlocks:
    return DiffusionBlocks(NoiseSettings(share_at_sigma_max=0.3), 6, blocks=BLOCKS)


def optimizer_of(clipping: float) -> OptimizerSettings:
    """With an epsilon as large as small gradients: else Adam makes whole steps of those that rounding alone makes differ from zero."""
    return OptimizerSettings(learning_rate=RATE, weight_decay=0.3, gradient_clipping=clipping, epsilon=1e-4)


@functools.cache
def reference(clipping: float) -> tuple[list[int], list[float], list[dict], dict[str, torch.Tensor]]:
    """The blocks that steps train, losses, norms by part and final weights."""
    objective, optimizer = build_objective(), optimizer_of(clipping)
    blocks = [objective.active_block(drawn(step)) for step in range(STEPS)]
    assert blocks == [1, 0, 0, 1, 2, 2, 1], f"{blocks}: block 1 idle for two steps with its momentum warm, 2 long untrained"
    model, losses, by_part = build_model().to(DEVICE), [], []
    embedding = model.embedding.weight
    shared = plain_adamw((p for name, p in model.named_parameters() if not name.startswith("cores")), embedding, optimizer)
    own = [plain_adamw(core.parameters(), embedding, optimizer) for core in model.cores]
    for step, block in enumerate(blocks):
        loss = objective(model, *micro_batch(range(step * GLOBAL, (step + 1) * GLOBAL), step)).value
        model.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        assert len(trained) < len(list(model.parameters()))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        before = copy_of_weights(model)
        if optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(trained, optimizer.gradient_clipping)
        shared.step()
        own[block].step()
        by_part.append(norms_by_part(gradients, before, copy_of_weights(model)))
        losses.append(loss.item())
    return blocks, losses, by_part, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check(case: str, world: World) -> None:
    """AssertionError when one block trained is not what the reference says, or an idle one moved."""
    way, precision, clipping = case.split()
    settings, clipping = EngineSettings(**WAYS[way], precision=precision), float(clipping)
    objective, optimizer = build_objective(), optimizer_of(clipping)
    blocks, losses, by_part, weights = reference(clipping)
    accumulation = GLOBAL // (MICRO * world.size)
    exact = settings.precision == "fp32"

    def build():
        return build_engine(settings, build_model(), objective, optimizer, MICRO, accumulation, world)

    def train(engine, first: int, last: int) -> None:
        for step in range(first, last):
            before = snapshot(engine)
            batches = (micro_batch(indices, step) for indices in rank_indices(step, GLOBAL, world.size, world.rank, MICRO))
            engine.measure_step()
            found = [loss.value.item() for loss in engine.train_step(batches, RATE, blocks[step])]
            loss = mean_of_ranks(found, world)
            assert abs(loss - losses[step]) < (1e-5 if exact else 0.02), f"step {step}: {loss} and not {losses[step]}"
            if exact:
                assert_norms_by_part(engine.norms_by_part(), by_part[step], f"step {step}")
            for (block, old), (_, new) in zip(before, snapshot(engine)):
                idle = block not in (None, blocks[step])
                assert identical(old, new) == idle, f"step {step} trains block {blocks[step]}, and block {block} says otherwise"

    engine = build()
    train(engine, 0, 3)  # up to a checkpoint that block 2, not trained yet, must be in
    if clipping:
        saved = whole_snapshot(engine, world)
    train(engine, 3, STEPS)
    for group, parameters in optimizer_groups(engine):
        own_steps = STEPS if group["block"] is None else blocks.count(group["block"])
        assert {int(engine._optimizer.state[parameter]["step"]) for parameter in parameters} == {own_steps}
    scale = {"embedding.weight": optimizer.embedding_scale}
    difference = largest_difference(engine.weights(), weights, lambda name: scale.get(name, 1.0))
    assert difference < (2e-6 if exact else 3 * RATE), f"weights are off by {difference}"

    if not clipping:
        return  # saving and loading has nothing to do with clipping: once is enough
    again = build()
    again.restore(saved.__getitem__)
    train(again, 3, STEPS)
    for (block, first), (_, second) in zip(snapshot(engine), snapshot(again)):
        assert identical(first, second), f"block {block} of a resumed run is not that of the whole one"


if __name__ == "__main__":
    sys.modules[deepspeed_config.__module__].PERSISTENT = 0  # else stage 3 would leave all of so small a model whole
    ways = itertools.product(WAYS, ("fp32", "bf16"), ("0.3", "0.0"))
    if ARGUMENTS[1] == "short":
        several = ("fsdp", "zero-1", "zero-3")
        ways = [way for way in ways if way[1:] == ("fp32", "0.3") or (way[0] in several and way[1:] != ("bf16", "0.0"))]
    run_cases(map(" ".join, ways), check)
