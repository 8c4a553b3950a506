"""One process of several: the collectives that engines use, checked for what they compute and timed, by NCCL on GPUs or gloo on the CPU."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.output import write_atomically
from ..distributed import World, end_process, start_process_group
from ..run_folder import start_facts

REPEATS = 5


def check(world: World) -> None:
    """AssertionError where a collective computes anything but what it must, of small whole numbers, which every dtype here adds exactly."""
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for count in (1, 1000, 1 << 16):
            own = torch.arange(count * world.size, device=world.device).remainder(7).add(world.rank).to(dtype)
            every = [torch.arange(count * world.size, device=world.device).remainder(7).add(rank).to(dtype) for rank in range(world.size)]
            total, share = sum(every), slice(world.rank * count, (world.rank + 1) * count)
            reduced, scattered = own.clone(), own.new_empty(count)
            dist.all_reduce(reduced)
            assert reduced.equal(total), f"all_reduce of {count} {dtype}"
            dist.reduce_scatter_tensor(scattered, own)
            assert scattered.equal(total[share]), f"reduce_scatter_tensor of {count} {dtype}"
            gathered = own.new_empty(own.numel() * world.size)
            dist.all_gather_into_tensor(gathered, own)
            assert gathered.equal(torch.cat(every)), f"all_gather_into_tensor of {count} {dtype}"
    groups = [dist.new_group([rank]) for rank in range(world.size)]
    alone = torch.full((3,), float(world.rank), device=world.device)
    dist.all_reduce(alone, group=groups[world.rank])
    assert alone.eq(world.rank).all(), "all_reduce in a group of one"
    if world.rank < world.size - world.size % 2:  # pairs
        pair = torch.full((5,), float(world.rank), device=world.device)
        if world.rank % 2:
            dist.send(pair, world.rank - 1)
        else:
            dist.recv(pair, world.rank + 1)
            assert pair.eq(world.rank + 1).all(), "send and recv"
    assert world.gather({"rank": world.rank}) == [{"rank": rank} for rank in range(world.size)], "all_gather_object"


def bandwidth(world: World, elements: int) -> dict[str, float]:
    """Bytes a second that a rank sends in each collective of so many bf16 elements, counted as `rdtrain/estimate.py` counts them."""
    size, ring = 2 * elements * world.size, (world.size - 1) / world.size
    whole = torch.ones(elements * world.size, dtype=torch.bfloat16, device=world.device)
    part = torch.ones(elements, dtype=torch.bfloat16, device=world.device)
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all_reduce": (lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX), 2 * size * ring),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), size * ring),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), size * ring),
    }
    return {name: sent / _seconds(call, whole) for name, (call, sent) in calls.items()}


def _seconds(call: Callable[[], object], tensor: Tensor) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        if tensor.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if tensor.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[REPEATS // 2]


def main() -> None:
    """Write what was found to the file that is given, on rank 0."""
    parser = argparse.ArgumentParser(prog="python -m rdtrain.scaling.collectives", description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=int, default=256, help="of the messages that are timed")
    options = parser.parse_args()
    world = World.from_environment()
    start_process_group(world)
    check(world)
    rates = bandwidth(world, options.megabytes * 1_000_000 // (2 * world.size))
    if world.is_main:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if world.device.type == "cuda" else None
        found = {"ranks": world.size, "backend": dist.get_backend(), "nccl": nccl, "megabytes": options.megabytes}
        found |= {"bytes_per_second": rates}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, json.dumps(found | {"facts": start_facts(world.device.type)}, indent=1) + "\n")
        speeds = ", ".join(f"{name} {1e-9 * rate:.1f}" for name, rate in rates.items())
        print(f"{world.size} ranks, {found['backend']} {nccl or ''}: right; GB/s that a rank sends: {speeds}")
    end_process(0)


if __name__ == "__main__":
    main()
