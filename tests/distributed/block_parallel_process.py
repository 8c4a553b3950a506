"""One process of test_block_parallel.py: holds block-parallel training to a slow loop in this process, and to what it may send and hold.

The loop keeps the whole model. For each block it takes the sequences of the block's ranks, adds up the gradients of the shared parts
with the blocks' probabilities by hand, clips by the norm as docs/method.md defines it, and steps torch's AdamW. Messages are what
torch.distributed is really asked to reduce.
"""

import functools
import gc
import weakref
from contextlib import contextmanager

import torch
import torch.distributed as dist
from processes import (
    ALONE,
    DEVICE,
    RATE,
    VOCABULARY,
    assert_norms_by_part,
    copy_of_weights,
    drawn,
    largest_difference,
    micro_batch,
    norms_by_part,
    plain_adamw,
    run_cases,
)

from rdtrain.data.loader import rank_indices
from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import DiffusionBlocks, ObjectiveSettings
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom

MICRO, ACCUMULATION, STEPS, BLOCKS, SHARE = 2, 2, 4, 2, 0.3
PROBABILITIES = [SHARE + (1 - SHARE) / BLOCKS] + [(1 - SHARE) / BLOCKS] * (BLOCKS - 1)
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce", "send", "recv", "isend", "irecv",
    "all_to_all", "all_to_all_single", "all_gather_object", "broadcast_object_list", "gather", "scatter", "barrier",
)


class OneBlock(DiffusionBlocks):
    """The objective on one block, told apart from how the package tells it."""

    def __init__(self, block: int, *settings):
        super().__init__(*settings)
        self.block = block

    def active_block(self, random: SampleRandom) -> int:
        return self.block


def objective_of(told: bool, block: int | None = None) -> DiffusionBlocks:
    """told: with an earlier iteration, which must stay in its block, and the core's own readout."""
    objective = ObjectiveSettings(self_conditioning=told, chain_states=told, core_readout=told)
    settings = NoiseSettings(share_at_sigma_max=SHARE), 6, objective, BLOCKS
    return DiffusionBlocks(*settings) if block is None else OneBlock(block, *settings)


def build_model(told: bool) -> RecurrentDepthLM:
    torch.manual_seed(0)
    return RecurrentDepthLM(
        ModelConfig(width=32, heads=4, mlp_width=48, prelude_layers=1, core_layers=2, coda_layers=1, iterations=6, blocks=BLOCKS,
                    vocab_size=VOCABULARY, **objective_of(told).model_fields)
    )


def slow_loop(told: bool, optimizer: OptimizerSettings, size: int) -> tuple[list[float], list[float], list[dict], dict[str, torch.Tensor]]:
    """Losses, norms, norms by part and final weights of a run on so many ranks, in one process."""
    model, objectives = build_model(told).to(DEVICE), [objective_of(told, block) for block in range(BLOCKS)]
    adamw = plain_adamw(model.parameters(), model.embedding.weight, optimizer)
    each = size // BLOCKS * MICRO * ACCUMULATION  # sequences of a block in a step; those of block 0 come first
    losses, norms, by_part = [], [], []
    for step in range(STEPS):
        total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        loss_of_step = 0.0
        for block, objective in enumerate(objectives):
            loss = objective(model, *micro_batch(range((step * BLOCKS + block) * each, (step * BLOCKS + block + 1) * each), step))
            gradients = torch.autograd.grad(loss.value, list(model.parameters()), allow_unused=True)
            for (name, _), gradient in zip(model.named_parameters(), gradients):
                own = name.startswith(f"cores.{block}.")
                assert (gradient is None) == (name.startswith("cores.") and not own), name
                if gradient is not None:
                    total[name] += gradient * (1.0 if own else PROBABILITIES[block])
            sums, count = loss.metrics["loss"]
            loss_of_step += PROBABILITIES[block] * sums.item() / count.item()
        probabilities = {name: PROBABILITIES[int(name.split(".")[1])] if name.startswith("cores.") else 1.0 for name in total}
        square = sum(probabilities[name] * gradient.double().square().sum().item() for name, gradient in total.items())
        before = copy_of_weights(model)
        for name, parameter in model.named_parameters():
            parameter.grad = total[name] * min(1.0, optimizer.gradient_clipping / square**0.5 if optimizer.gradient_clipping else 1.0)
        adamw.step()
        counted = {name: probabilities[name] ** 0.5 * gradient for name, gradient in total.items()}
        by_part.append(norms_by_part(counted, before, copy_of_weights(model)))
        losses.append(loss_of_step)
        norms.append(square**0.5)
    return losses, norms, by_part, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextmanager
def messages():
    """All that goes through torch.distributed: (collective, number of ranks, elements)."""
    seen, originals = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def watched(name):
        def call(tensor=None, *arguments, group=None, **named):
            seen.append((name, dist.get_world_size(group), tensor.numel() if isinstance(tensor, torch.Tensor) else None))
            return originals[name](tensor, *arguments, group=group, **named)
        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def predicted(model: RecurrentDepthLM) -> tuple[int, int, int]:
    """By docs/architecture.md: parameters of the shared parts and of a core, and tensors that a rank holds."""
    config = model.config
    width, condition = config.width, 128
    plain = 4 * width**2 + 3 * width * config.mlp_width + 4 * width
    conditioned = plain + (condition + 1) * 4 * width
    shared = config.vocab_size * width + config.prelude_layers * plain + config.coda_layers * conditioned + width
    shared += 2 * condition * (condition + 1) + config.self_conditioning * width**2 + config.core_readout * (width + 1)
    tensors = 8 * config.prelude_layers + 10 * (config.coda_layers + config.core_layers) + 1 + 1 + 4 + 1
    return shared, 2 * width**2 + config.core_layers * conditioned, tensors + config.self_conditioning + 2 * config.core_readout


def check(case: str, world: World) -> str:
    """AssertionError where training is not the loop's; returns the largest deviations of a loss and a weight."""
    kind, clipping, precision, compiled = case.split()
    told, compiled = kind == "told", compiled == "compiled"
    optimizer = OptimizerSettings(learning_rate=RATE, weight_decay=0.3, gradient_clipping=float(clipping), epsilon=1e-4)
    losses, norms, by_part, weights = slow_loop(told, optimizer, world.size)
    exact, members = precision == "fp32", world.size // BLOCKS
    shared, core, tensors = predicted(build_model(told))

    def build():
        settings = EngineSettings("block_parallel", precision=precision, compile=compiled)
        objective = objective_of(told)
        return build_engine(settings, build_model(told), objective, optimizer, MICRO, ACCUMULATION, world), objective

    def train(engine, objective, first: int, last: int) -> tuple[list[float], list[float]]:
        found, measured = [], []
        for step in range(first, last):
            batches = (
                micro_batch(indices, step)
                for indices in rank_indices(step, world.size * MICRO * ACCUMULATION, world.size, world.rank, MICRO, BLOCKS)
            )
            block = objective.active_block(drawn(step))
            engine.measure_step()
            with messages() as seen:
                results = engine.train_step(batches, RATE, block)
            expected = [("all_reduce", members, core)] if members > 1 else []
            assert seen == [*expected, ("all_reduce", world.size, shared + 1)], f"step {step} sent {seen}"
            sums = world.sum(sum(torch.stack(loss.metrics["loss"]) for loss in results))
            found.append((sums[0] / sums[1]).item())
            measured.append(engine.gradient_norm())
            if exact:
                assert_norms_by_part(engine.norms_by_part(), by_part[step], f"step {step}")
        return found, measured

    engine, objective = build()
    held = engine.facts["block_parallel"]
    reduced = {"core": 4 * core if members > 1 else 0, "shared": 4 * (shared + 1)}
    assert held["reduced_bytes_per_step"] == reduced and held["group_ranks"] == members
    floats = 4 * (shared + core)
    assert held["held_bytes_per_rank"] == {"weights": floats, "gradients": floats + 4, "optimizer_state": 2 * floats + 4 * tensors}
    block = world.rank // members
    own = {name for name in weights if not name.startswith("cores.") or name.startswith(f"cores.{block}.")}
    assert {name for name, _ in engine.model.named_parameters()} == own

    found, measured = train(engine, objective, 0, STEPS)
    off = max(abs(loss - right) for loss, right in zip(found, losses))
    assert off < (1e-5 if exact else 0.03), f"losses {found} and not {losses}"
    norm_off = max(abs(norm - right) / right for norm, right in zip(measured, norms))
    assert norm_off < (1e-4 if exact else 0.1), f"norms {measured} and not {norms}"
    gathered = engine.weights()
    assert gathered.keys() == (weights.keys() if world.is_main else set())
    weight_off = largest_difference(gathered, weights)
    assert weight_off < (5e-6 if exact else 3 * RATE * optimizer.embedding_scale), f"weights are off by {weight_off}"
    check_resumed(build, train, found, measured, gathered, weights, world, compiled)
    model = weakref.ref(engine.model)
    engine.close()
    del engine
    torch._dynamo.reset()  # compiled code keeps what it was made for
    gc.collect()
    assert model() is None, "an engine that was closed stays in memory"
    return f"{off:.1e} {norm_off:.1e} {weight_off:.1e}"


def check_resumed(build, train, found: list[float], measured: list[float], gathered: dict, names: dict, world: World,
                  warmed_up: bool) -> None:
    """A run that is stopped in the middle goes on to the bit, and its state survives the way over an engine that holds all blocks.

    warmed_up: before every step, which changes nothing."""
    engine, objective = build()
    train(engine, objective, 0, STEPS // 2)
    shares = world.gather(engine.snapshot())
    state = {name: tensor for share in shares for name, tensor in share.items()}
    assert sum(len(share) for share in shares) == len(state) == 4 * len(names) and all(shares)
    for share in shares:
        assert {name.split("/")[0] for name in share} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    model = build_model(engine.model.config.self_conditioning)
    whole = build_engine(EngineSettings("torch"), model, objective_of(False), OptimizerSettings(), MICRO, 1, ALONE)
    whole.restore(state.__getitem__)
    state = whole.snapshot()
    again, objective = build()
    again.restore(state.__getitem__)
    continued = [], []
    for step in range(STEPS // 2, STEPS):
        if warmed_up:
            again.warm_up(*micro_batch(range(MICRO), 0))
        for values, more in zip(continued, train(again, objective, step, step + 1)):
            values += more
    assert continued == (found[STEPS // 2 :], measured[STEPS // 2 :])
    resumed = again.weights()
    assert all(resumed[name].equal(tensor) for name, tensor in gathered.items())


if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")  # all but the kernels' code, which takes minutes
    cases = ("plain 0.3 fp32 uncompiled", "told 0.0 fp32 uncompiled", "plain 0.3 bf16 uncompiled", "plain 0.3 fp32 compiled")
    run_cases(cases, check, engine="block_parallel")
