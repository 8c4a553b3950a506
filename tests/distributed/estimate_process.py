"""One process of test_estimate.py: holds estimate.py to the tensors that every engine keeps and the collectives that it calls.

A case is an engine, a precision and an objective. Tensors are found among all living objects, before the first micro-batch, between two and
as the optimizer steps; what there is beside weights and optimizer state, at the moment with the most of it, is gradients, and before the
first micro-batch those that are standing. Collectives are seen by torch's dispatcher. A line of notes for each case holds the largest
deviations of memory and of traffic.
"""

import gc
import importlib
import itertools
import sys
import time
from collections import Counter

import torch
from processes import ARGUMENTS, BUCKET, DEVICE, run_cases
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdtrain.config import BatchSettings, Config
from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.optimization import BlockAdamW
from rdtrain.randomness import SampleRandom

MICRO, LENGTH, ACCUMULATION = 2, 8, 2
WAYS = {
    "fsdp": {"name": "fsdp"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-offload": {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
}
OBJECTIVES = {
    "blocks": ({"name": "diffusion_blocks"}, 1), "untied": ({"name": "diffusion_blocks"}, 2),
    "bptt": ({"name": "bptt", "gradient": "full", "depth": "fixed"}, 1),
}
KINDS = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_coalesced_": "all_reduce", "allgather_into_tensor_coalesced_": "all_gather",  # several messages as one, by NCCL alone
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}
"""Collectives by the names that torch's dispatcher knows them by."""
EVERY_OBJECTIVE = (("fsdp", "fp32"), ("zero-1", "bf16"), ("zero-2", "fp32"), ("zero-3", "bf16"))
CASES = {
    "short": [f"{way} bf16 blocks" for way in WAYS] + ["fsdp fp32 untied", "fsdp fp32 bptt", "zero-1 bf16 untied", "zero-3 bf16 bptt"],
    "full": [
        " ".join(case) for case in itertools.product(WAYS, ("fp32", "bf16"), OBJECTIVES)
        if case[2] == "blocks" or case[:2] in EVERY_OBJECTIVE
    ],
}


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Bytes by address of what tensors, and this rank's part of those that ZeRO-3 has sharded, lie in."""
    found = {}
    for tensor in tensors:
        for each in (tensor, getattr(tensor, "ds_tensor", None)):
            if each is not None:
                storage = (each.to_local() if isinstance(each, DTensor) else each).untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return {address: size for address, size in found.items() if size not in (2 * BUCKET, 4 * BUCKET)}  # no message buffers


def living() -> list[torch.Tensor]:
    """Every tensor there is, gradients too."""
    time.sleep(0.05)  # a thread of gloo's holds on to a message that has arrived, until it gets its turn
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


class Collectives(TorchDispatchMode):
    """Adds up the bytes of the messages of each kind."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = KINDS.get(function.overloadpacket.__name__)
        if kind:
            sizes = [sum(t.numel() * t.element_size() for t in tree_leaves(part) if isinstance(t, torch.Tensor)) for part in args[:2]]
            self.bytes[kind] += max(sizes)
        return function(*args, **(kwargs or {}))


def check(case: str, world: World) -> str:
    """AssertionError where a case is not what estimate.py says; returns its largest deviations."""
    estimate = sys.modules["rdtrain.estimate"]
    way, precision, name = case.split()
    settings, blocks = OBJECTIVES[name]
    config = Config(
        engine=EngineSettings(**WAYS[way], precision=precision), objective=ObjectiveSettings(**settings),
        batch=BatchSettings(MICRO * ACCUMULATION * world.size, MICRO),
    )
    before = living()  # kept, so that no address is used again
    addresses = storages(before).keys()
    objective = build_objective(config.objective, NoiseSettings(), 4, blocks)
    shape = ModelConfig(width=64, heads=4, mlp_width=96, prelude_layers=1, core_layers=2, coda_layers=1, iterations=4, blocks=blocks,
                        vocab_size=501, **objective.model_fields)
    engine = build_engine(config.engine, RecurrentDepthLM(shape), objective, config.optimizer, MICRO, ACCUMULATION, world)

    def now() -> int:
        return sum(size for address, size in storages(living()).items() if address not in addresses)

    held = []
    step_of_optimizer = BlockAdamW.step

    def step_noted(self, closure=None):
        held.append(now())
        return step_of_optimizer(self, closure)

    def micro_batches(noted: bool):
        for _ in range(ACCUMULATION):
            if noted:
                held.append(now())
            yield torch.zeros(MICRO, LENGTH + 1, dtype=torch.int64, device=DEVICE), SampleRandom(1, range(MICRO), DEVICE, 0)

    block = objective.active_block(SampleRandom(1, (), DEVICE, 0))
    for _ in range(2):  # the second is as all that follow
        with Collectives() as collectives:
            engine.train_step(micro_batches(False), 1e-3, block)
    BlockAdamW.step = step_noted
    engine.train_step(micro_batches(True), 1e-3, block)
    BlockAdamW.step = step_of_optimizer

    state = engine._optimizer.state
    weights = sum(storages([*engine.model.parameters(), *state]).values())
    moments = sum(storages([moment for each in state.values() for moment in (each["exp_avg"], each["exp_avg_sq"])]).values())
    number = config.engine.dtype(DEVICE).itemsize
    shares = estimate.Shares.of(estimate.model_on_paper(shape), config, objective, world.size)
    said = estimate.engine_memory(shares, config, number, ACCUMULATION)
    found = {
        "optimizer state": (moments, said.optimizer_state + said.host_optimizer_state),
        "weights": (weights, said.weights + said.host_weights),
        "all": (max(held[1:]), said.weights + said.gradients + said.optimizer_state + said.host_bytes),
    }
    if not config.engine.offload_optimizer:  # whose buffers on this CPU are not told from the device's
        found["before"] = held[0], said.weights + said.standing + said.optimizer_state
    traffic = estimate.step_traffic(shares, config, objective, number, ACCUMULATION, world.size)
    ring = (world.size - 1) / world.size
    sent = {
        kind: (collectives.bytes[kind] * ring * (2 if kind == "all_reduce" else 1), getattr(traffic, kind))
        for kind in ("all_reduce", "all_gather", "reduce_scatter")
    }
    deviations = []
    for part, tolerance in ((found, 0.06 if name == "untied" else 0.02), (sent, 0.01)):  # what stage 3 has gathered ahead may be idle
        worst = max(abs(right - told) / max(right, told, 10_000) for right, told in part.values())
        assert worst < tolerance, f"{case}: found and told: { {key: tuple(map(int, pair)) for key, pair in part.items()} }"
        deviations.append(worst)
    if hasattr(engine, "_engine"):
        engine._engine.destroy()
    return " ".join(f"{deviation:.1e}" for deviation in deviations)


if __name__ == "__main__":
    settings = sys.modules["rdtrain.engine.deepspeed_config"]
    settings.PERSISTENT = 1000  # a real one, or real buckets, would hide so small a model
    importlib.import_module("rdtrain.estimate")  # which takes them over
    gc.collect()
    gc.freeze()  # what is there by now need not be searched again and again
    run_cases(CASES[ARGUMENTS[1]], check)
