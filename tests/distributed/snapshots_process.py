"""One process of test_snapshots.py: the portable form is the same whatever engine holds it, and nothing is lost on the way in and out.

What is exact is held to the bit, -0.0 included: a snapshot that is restored into another engine and taken again, before a first step and
with blocks that were never trained, and the bf16 weights that an engine runs, which are its fp32 weights rounded. Snapshots of engines
that trained alike agree as far as their sums do. `short` has each engine in one precision at least, and each way of holding state.
"""

import functools
import sys

import torch
from blocks_process import BLOCKS, GLOBAL, MICRO, WAYS, build_model
from processes import ALONE, ARGUMENTS, RATE, WORLD, drawn, micro_batch, run_cases, whole_snapshot

from rdtrain.data.loader import rank_indices
from rdtrain.distributed import World
from rdtrain.engine import Engine, EngineSettings, build_engine, deepspeed_config
from rdtrain.engine.portable import owners
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks
from rdtrain.optimization import OptimizerSettings

STEPS = 4
OBJECTIVE = DiffusionBlocks(NoiseSettings(), 6, blocks=BLOCKS)
OPTIMIZER = OptimizerSettings(learning_rate=RATE, weight_decay=0.3, epsilon=1e-4)  # so large for the reason in blocks_process.py
ROUNDED = ("fsdp", "zero-1", "zero-3", "zero-1-offload", "zero-3-offload")
"""In bf16: those that run bf16 weights, but for ZeRO-2, which keeps its state as ZeRO-1 does."""

SHORT = ["torch fp32", "fsdp fp32", "zero-0 fp32", "zero-1 fp32", "zero-2-offload fp32", "fsdp bf16", "zero-1 bf16", "zero-3 bf16"]
TOLERANCE = {"fp32": 1e-6, "bf16": 3 * RATE * OPTIMIZER.embedding_scale}


def build(way: str, precision: str, world: World) -> Engine:
    accumulation = GLOBAL // (MICRO * world.size)
    return build_engine(EngineSettings(**WAYS[way], precision=precision), build_model(), OBJECTIVE, OPTIMIZER, MICRO, accumulation, world)


def train(engine: Engine, world: World) -> None:
    for step in range(STEPS):
        batches = (micro_batch(indices, step) for indices in rank_indices(step, GLOBAL, world.size, world.rank, MICRO))
        engine.train_step(batches, RATE, OBJECTIVE.active_block(drawn(step)))


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.shape == second[name].shape and torch.equal(tensor.view(torch.int32), second[name].view(torch.int32))
        for name, tensor in first.items()
    )


def marked(snapshot: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other numbers of the same shapes, none like another, with -0.0 among them; blocks and what they share have steps of their own."""
    generator, steps, changed = torch.Generator().manual_seed(1), {"cores.0": 3.0, "cores.1": 0.0, "cores.2": 9.0}, {}
    for name, tensor in snapshot.items():
        kind, parameter = name.split("/")
        changed[name] = torch.randn(tensor.shape, generator=generator) if kind != "step" else torch.tensor(steps.get(parameter[:7], 12.0))
        if kind == "exp_avg":
            changed[name].flatten()[::7] = -0.0
    return changed


@functools.cache
def right_snapshot() -> dict[str, torch.Tensor]:
    """What one process without any sharding ends with."""
    reference = build("torch", "fp32", ALONE)
    train(reference, ALONE)
    return reference.snapshot()


def check(way: str, precision: str, world: World) -> str:
    """AssertionError where an engine's snapshots are not what they must be; returns their largest deviation from the right one."""
    right = right_snapshot()
    engine = build(way, precision, world)
    start = whole_snapshot(engine, world)
    model = build_model()
    assert start.keys() == right.keys() == {f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq", "step") for name, _ in
                                            model.named_parameters()}
    dtype = torch.bfloat16 if precision == "bf16" and way.startswith("zero") else torch.float32  # that it runs
    assert all(tensor.to(dtype).float().equal(start[f"weight/{name}"]) for name, tensor in model.named_parameters())
    assert not any(tensor.any() for name, tensor in start.items() if not name.startswith("weight/"))

    share = engine.snapshot()
    kept = {name: tensor.clone() for name, tensor in share.items()}
    assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in share.values())
    train(engine, world)
    assert same_bits(share, kept), "training changed a snapshot"
    trained = whole_snapshot(engine, world)
    assert all(trained[name].equal(right[name]) for name in right if name.startswith("step/"))
    off = max((trained[name] - tensor).abs().max().item() for name, tensor in right.items())
    assert off < TOLERANCE[precision], f"off by {off:.1e}"

    other = build(way, precision, world)
    for saved in (trained, marked(trained)):
        other.restore(saved.__getitem__)
        assert same_bits(whole_snapshot(other, world), saved), "a restored engine gives another snapshot"
        for name, weight in other.weights().items():
            assert weight.dtype == dtype and weight.cpu().equal(saved[f"weight/{name}"].to(dtype)), f"{name} is not the restored one"
        other.held_out_nll(*micro_batch(range(2), 0))  # gathers weights, which a second restore must not leave in place
    return f"{off:.1e}"


def check_case(case: str, world: World) -> str:
    """ZeRO-3 both with nothing left whole between steps and with all of so small a model."""
    way, precision = case.split()
    for persistent in (0, 100_000) if way == "zero-3" else (0,):
        sys.modules[deepspeed_config.__module__].PERSISTENT = persistent
        said = check(way, precision, world)
    return said


if __name__ == "__main__":
    sizes = {name: parameter.numel() for name, parameter in build_model().named_parameters()}
    share = sum(size for name, size in sizes.items() if owners(sizes, WORLD.size)[name] == WORLD.rank)
    assert share <= sum(sizes.values()) / WORLD.size + max(sizes.values())
    cases = [f"{way} fp32" for way in WAYS] + [f"{way} bf16" for way in ROUNDED]
    run_cases(cases if ARGUMENTS[1] == "full" else SHORT, check_case)
