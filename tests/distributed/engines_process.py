"""One process of test_engines.py: holds the losses of every engine and stage to one plain PyTorch loop, and notes each case that was right.

The loop is written out here: whole global batches, torch's AdamW, its own clipping, no engine. A case is an engine, an objective with or
without activation checkpointing, a number of micro-batches and a precision; a line of notes holds its largest deviations. What else a
case must show: gathered weights that are the loop's, weights sharded between steps where they should be and gathered no oftener for a
deeper step, the same held-out likelihood as without sharding, and a run that was saved and loaded going on bit for bit. Compiled cases
compile nothing after half of the steps, and a run that is warmed up, at its start and after every step, is to the bit the one that was
not. Whatever engines the process had before, PyTorch's linear function is its own. `short` compiles without the last stage, which writes
the kernels' code and takes minutes of C++, and a core of one layer, as each takes seconds to trace; `full` with it, and of two. ZeRO-1
has every case of `short`, the others those that their way of holding weights and gradients could go wrong in.
"""

import functools
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from processes import (
    ARGUMENTS,
    DEVICE,
    RATE,
    VOCABULARY,
    assert_norms_by_part,
    copy_of_weights,
    mean_of_ranks,
    micro_batch,
    norms_by_part,
    plain_adamw,
    run_cases,
    whole_snapshot,
)
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rdtrain.data.loader import rank_indices
from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine, deepspeed_config
from rdtrain.metrics import slowest_rank
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import DiffusionBlocks, Objective, ObjectiveSettings, build_objective
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom

GLOBAL, ITERATIONS = 16, 4
TOLERANCE = {"fp32": 1e-5, "bf16": 0.01}
"""Of losses, relative to the fp32 loop's."""
CHAIN_TOLERANCE = TOLERANCE | {"bf16": 0.1}
"""One plain process in bf16 is 3e-2 off the fp32 loop in a step: where a state decides between two tokens, its next one jumps."""
WEIGHT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.3}
"""Of a final weight's norm. In bf16 one plain process is 0.07 off the fp32 loop after 50 steps, and bf16 weights (fsdp) are 0.15 off."""

WAYS = {
    "fsdp": {"name": "fsdp"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-offload": {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
    **{f"zero-{stage}-compiled": {"name": "deepspeed", "zero_stage": stage, "compile": True} for stage in (0, 1, 2)},
    "fsdp-compiled": {"name": "fsdp", "compile": True},
}
OBJECTIVES = {
    "diffusion_blocks": {"name": "diffusion_blocks"},
    "chain": {"name": "diffusion_blocks", "self_conditioning": True, "chain_states": True, "core_readout": True},
    "truncated": {"name": "bptt", "gradient": "truncated", "trained_iterations": 2},
    "full": {"name": "bptt", "gradient": "full"},
}
SHORT = [
    ("diffusion_blocks", False, 1, "fp32"), ("chain", False, 2, "fp32"), ("truncated", True, 2, "fp32"), ("full", False, 1, "fp32"),
    ("diffusion_blocks", False, 2, "bf16"), ("truncated", False, 1, "bf16"),
]
FULL = [
    (objective, checkpointing, accumulation, precision)
    for precision in ("fp32", "bf16")
    for objective in OBJECTIVES
    for checkpointing in ((False, True) if OBJECTIVES[objective]["name"] == "bptt" else (False,))
    for accumulation in (1, 4)
]
COMPILED = [("diffusion_blocks", False, 4, "fp32"), ("truncated", True, 4, "fp32"), ("chain", False, 4, "bf16")]
SHORT_BY_WAY = {
    "fsdp": SHORT[1:5], "zero-0": [SHORT[4]], "zero-2": [SHORT[1], SHORT[4]], "zero-3": [SHORT[1], SHORT[2], SHORT[4]],
    **{f"zero-{stage}-offload": [("diffusion_blocks", False, 2, "fp32")] for stage in (1, 2, 3)},
}
SHORT_COMPILED = {"zero-1-compiled": ("diffusion_blocks", False, 2, "fp32"), "fsdp-compiled": ("truncated", True, 2, "fp32")}
CHECKPOINTING = {"activation_checkpointing": True, "layer_checkpointing": "full"}
STEPS = {"short": 4, "full": 50}


def cases(length: str) -> list[str]:
    """The names of the cases of `short` or `full`, in the order in which they run."""
    names = []
    for way in WAYS:
        if way.endswith("compiled"):
            chosen = COMPILED if length == "full" else [SHORT_COMPILED[way]] if way in SHORT_COMPILED else []
        else:
            chosen = FULL if length == "full" else SHORT_BY_WAY.get(way, SHORT)
        names += [" ".join((way, name, "checkpointed" if again else "plain", f"{count}x", precision))
                  for name, again, count, precision in chosen]
    return names


def core_layers(settings: EngineSettings) -> int:
    """Of a case's model."""
    return 1 if settings.compile and ARGUMENTS[1] == "short" else 2


def build(name: str, checkpointing: bool, layers: int) -> tuple[RecurrentDepthLM, Objective]:
    settings = ObjectiveSettings(**OBJECTIVES[name], **(CHECKPOINTING if checkpointing else {}))
    objective = build_objective(settings, NoiseSettings(), ITERATIONS)
    torch.manual_seed(0)
    config = ModelConfig(
        width=32, heads=4, mlp_width=48, prelude_layers=1, core_layers=layers, coda_layers=1, iterations=ITERATIONS,
        vocab_size=VOCABULARY, **objective.model_fields,
    )
    return RecurrentDepthLM(config), objective


def held_out() -> tuple[torch.Tensor, SampleRandom]:
    """Three sequences, and what is drawn for them."""
    return micro_batch(range(3), 0)[0], SampleRandom("validation", range(3), DEVICE)


OPTIMIZER = OptimizerSettings(learning_rate=RATE, gradient_clipping=0.5)
LINEAR = F.linear


@functools.cache
def plain_run(name: str, steps: int, layers: int) -> tuple[list[float], list[float], list[dict], dict[str, torch.Tensor], float]:
    """Losses, gradient norms, norms by part, final weights and final held-out likelihood of three sequences."""
    model, objective = build(name, False, layers)
    optimizer = plain_adamw(model.to(DEVICE).parameters(), model.embedding.weight, OPTIMIZER)
    losses, norms, by_part = [], [], []
    for step in range(steps):
        loss = objective(model, *micro_batch(range(step * GLOBAL, (step + 1) * GLOBAL), step)).value
        optimizer.zero_grad()
        loss.backward()
        gradients, before = {key: p.grad.clone() for key, p in model.named_parameters()}, copy_of_weights(model)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clipping).item())
        optimizer.step()
        by_part.append(norms_by_part(gradients, before, copy_of_weights(model)))
        losses.append(loss.item())
    with torch.no_grad():
        nll = objective.held_out_nll(model, *held_out()).mean().item()
    return losses, norms, by_part, {key: value.clone() for key, value in model.state_dict().items()}, nll


class Gathers(TorchDispatchMode):
    """Counts the messages by which ranks gather weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def check_sharding(engine) -> None:
    """Between two steps a rank holds its part of the weights."""
    for name, parameter in engine.model.named_parameters():
        whole = not isinstance(parameter, DTensor) and getattr(parameter, "ds_status", None) != ZeroParamStatus.NOT_AVAILABLE
        assert not whole, f"{name} is whole"


def check_slow_rank(engine, micro: int, world: World) -> None:
    """The last rank's passes take a second longer, for which the others wait in the step, and not in their own passes."""
    passes = DiffusionBlocks.__call__
    DiffusionBlocks.__call__ = lambda *arguments: time.sleep(world.rank == world.size - 1) or passes(*arguments)
    try:
        engine.measure_step()
        engine.train_step([micro_batch(range(world.rank * micro, (world.rank + 1) * micro), 0)], RATE)
    finally:
        DiffusionBlocks.__call__ = passes
    told = slowest_rank(engine.measurement.pass_seconds(), 0.0, world)
    assert told["slowest_rank"] == world.size - 1 and told["slowest_rank_excess"] > 0.2, told
    if world.size == 2:  # the median is the mean of both
        assert told["rank_seconds"] * (1 - told["slowest_rank_excess"]) < 0.9, told


def check(case: str, steps: int, world: World) -> str:
    """AssertionError where a case is not what the plain loop says; returns its largest deviations."""
    way, name, checkpointing, accumulation, precision = case.split()
    settings, accumulation = EngineSettings(**WAYS[way], precision=precision), int(accumulation[:-1])
    tolerance = (CHAIN_TOLERANCE if name == "chain" else TOLERANCE)[precision]
    losses, norms, by_part, weights, nll = plain_run(name, steps, core_layers(settings))
    torch._dynamo.reset()  # compiled code is kept for each function, and the case before has filled its place
    micro, exact = GLOBAL // accumulation // world.size, precision == "fp32"

    def start():
        model, objective = build(name, checkpointing == "checkpointed", core_layers(settings))
        return build_engine(settings, model, objective, OPTIMIZER, micro, accumulation, world)

    def train(engine, first: int, last: int) -> list[tuple[float, float]]:
        found = []
        for step in range(first, last):
            batches = (micro_batch(indices, step) for indices in rank_indices(step, GLOBAL, world.size, world.rank, micro))
            counted = OBJECTIVES[name]["name"] == "bptt" and way in ("fsdp", "zero-3")
            engine.measure_step()
            with Gathers() if counted else nullcontext() as gathers:
                values = [loss.value.item() for loss in engine.train_step(batches, RATE)]
            assert len(values) == accumulation
            if counted:  # once for the forward pass and once for the backward, whatever the depth
                assert gathers.count <= 2 * accumulation * len(weights), f"{case}: {gathers.count} gathers in step {step}"
            assert F.linear is LINEAR, f"{case}: layers of other models would call {F.linear}"
            loss, norm = mean_of_ranks(values, world), engine.gradient_norm()
            found.append((loss, norm))
            if exact:  # in bf16 a part's own norm has more rounding in it than the whole one's, which is held to the loop's below
                off = f"off by {abs(loss - losses[step]) / losses[step]:.1e} in loss, {abs(norm - norms[step]) / norms[step]:.1e} in norm"
                assert_norms_by_part(engine.norms_by_part(), by_part[step], f"{case}: step {step}, {off}")
        return found

    def likelihood(engine) -> float:
        return engine.held_out_nll(*held_out()).mean().item()

    def warm_up(engine) -> None:
        """Where the engine compiles; nothing elsewhere."""
        if not settings.compile:
            return
        engine.warm_up(*micro_batch(range(world.rank * micro, (world.rank + 1) * micro), 0))
        assert all(parameter.grad is None for parameter in engine.model.parameters())

    engine = start()
    middle, compiled_before = steps // 2, counters["stats"]["unique_graphs"]
    found = train(engine, 0, middle)
    likelihood(engine)  # between steps it changes nothing
    saved = whole_snapshot(engine, world)
    graphs = counters["stats"]["unique_graphs"]
    assert (graphs > compiled_before) == settings.compile
    found += train(engine, middle, steps)
    assert counters["stats"]["unique_graphs"] == graphs, f"{case}: something is compiled after step {middle}"
    if settings.name == "fsdp" or settings.zero_stage == 3:
        check_sharding(engine)
    off = max(abs(loss - right) / right for (loss, _), right in zip(found, losses))
    norms_off = sorted(abs(norm - right) / right for (_, norm), right in zip(found, norms))
    # In bf16 one plain process is 0.7 off in a step of many iterations, whose gradient is all but exploding: there the median must do.
    norm_off = norms_off[-1 if exact else len(norms_off) // 2]
    nll_off = abs(likelihood(engine) - nll) / nll
    assert off < tolerance, f"{case}: a loss is off by {off:.1e}"
    assert norm_off < (1e-3 if exact else 0.1), f"{case}: a gradient norm is off by {norm_off:.1e}"
    assert nll_off < tolerance, f"{case}: the held-out likelihood is off by {nll_off:.1e}"
    gathered = engine.weights()
    assert gathered.keys() == (weights.keys() if world.is_main else set())
    for key, tensor in gathered.items():
        right = weights[key].to(tensor.device)
        error = (tensor.float() - right).norm() / right.norm().clamp(min=1)
        assert error < WEIGHT_TOLERANCE[precision], f"{case}: {key} is off by {error:.1e}"

    if case == "zero-1 diffusion_blocks plain 1x fp32":
        check_slow_rank(engine, micro, world)
    if accumulation == 1 and not settings.compile:
        return f"{off:.1e} {norm_off:.1e}"  # saving and loading has nothing to do with accumulation: once is enough
    again, continued = start(), []
    warm_up(again)
    again.restore(saved.__getitem__)
    for step in range(middle, steps):
        continued += train(again, step, step + 1)
        warm_up(again)
    assert continued == found[middle:], f"{case}: a resumed run is not the whole one"
    resumed = again.weights()
    assert all(resumed[key].equal(gathered[key]) for key in gathered)
    return f"{off:.1e} {norm_off:.1e}"


if __name__ == "__main__":
    sys.modules[deepspeed_config.__module__].PERSISTENT = 0  # else stage 3 would leave all of so small a model whole
    if ARGUMENTS[1] == "short":
        torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    run_cases(cases(ARGUMENTS[1]), lambda case, world: check(case, STEPS[ARGUMENTS[1]], world))
