"""One process of test_snapshots.py: the portable form is the same whatever engine holds it, and nothing is lost on the way in and out.

What is exact is held to the bit, -0.0 included: a snapshot that is restored into another engine and taken again, before a first step and
with blocks that were never trained, and the bf16 weights that an engine runs, which are its fp32 weights rounded. Snapshots of engines
that trained alike agree as far as their sums do.
"""

import sys
from pathlib import Path

import torch
from blocks_process import ALONE, BLOCKS, CPU, GLOBAL, MICRO, RATE, SEED, WAYS, build_model, micro_batch
from engines_process import whole_snapshot

from rdtrain.data.loader import rank_indices
from rdtrain.distributed import World, leave
from rdtrain.engine import Engine, EngineSettings, build_engine, deepspeed_config, start_processes
from rdtrain.engine.portable import owners
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom

STEPS = 4
OBJECTIVE = DiffusionBlocks(NoiseSettings(), 6, blocks=BLOCKS)
OPTIMIZER = OptimizerSettings(learning_rate=RATE, weight_decay=0.3, epsilon=1e-4)  # so large for the reason in blocks_process.py
ROUNDED = ("fsdp", "zero-1", "zero-3", "zero-1-offload", "zero-3-offload")
"""In bf16: those that run bf16 weights, but for ZeRO-2, which keeps its state as ZeRO-1 does."""

TOLERANCE = {"fp32": 1e-6, "bf16": 3 * RATE * OPTIMIZER.embedding_scale}


def build(way: str, precision: str, world: World) -> Engine:
    accumulation = GLOBAL // (MICRO * world.size)
    return build_engine(EngineSettings(**WAYS[way], precision=precision), build_model(), OBJECTIVE, OPTIMIZER, MICRO, accumulation, world)


def train(engine: Engine, world: World) -> None:
    for step in range(STEPS):
        batches = (micro_batch(indices, step) for indices in rank_indices(step, GLOBAL, world.size, world.rank, MICRO))
        engine.train_step(batches, RATE, OBJECTIVE.active_block(SampleRandom(SEED, (), CPU, step)))


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


def check(way: str, precision: str, world: World, right: dict[str, torch.Tensor]) -> str:
    """AssertionError where an engine's snapshots are not what they must be; returns their largest deviation from the right one."""
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
    assert all(tensor.device == CPU and tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in share.values())
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
            assert weight.dtype == dtype and weight.equal(saved[f"weight/{name}"].to(dtype)), f"{name} is not the restored one"
        other.held_out_nll(*micro_batch(range(2), 0))  # gathers weights, which a second restore must not leave in place
    return f"{off:.1e}"


def main() -> None:
    folder, world = Path(sys.argv[-1]), World.from_environment()
    start_processes(EngineSettings("deepspeed"), world)
    sizes = {name: parameter.numel() for name, parameter in build_model().named_parameters()}
    share = sum(size for name, size in sizes.items() if owners(sizes, world.size)[name] == world.rank)
    assert share <= sum(sizes.values()) / world.size + max(sizes.values())
    reference = build("torch", "fp32", ALONE)
    train(reference, ALONE)
    right = reference.snapshot()
    for way, precision in [(way, "fp32") for way in WAYS] + [(way, "bf16") for way in ROUNDED]:
        if way == "torch" and not world.is_main:
            continue
        for persistent in (0, 100_000) if way == "zero-3" else (0,):
            sys.modules[deepspeed_config.__module__].PERSISTENT = persistent  # nothing is left whole, or all of so small a model
            deviation = check(way, precision, ALONE if way == "torch" else world, right)
        if world.is_main:
            with (folder / "right.txt").open("a") as notes:
                print(f"{way} {precision} {deviation}", file=notes)
    leave()


if __name__ == "__main__":
    main()
