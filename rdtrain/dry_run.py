"""`rdtrain train --dry-run`: a run checked and costed without starting it, for a world of any size and either kind of device.

What a start would find wrong is found here by the same code: the config, shards and tokenizer, the division of the batch, the engine and
the run's folder; and so is a lack of room for its checkpoints. No process is started, no GPU is touched and nothing is written.
"""

import shutil
from dataclasses import fields
from pathlib import Path

from .checkpoint_storage import checkpoint_steps
from .config import Config
from .distributed import World
from .errors import UserError
from .estimate import Memory, Shares, checkpoint_bytes, model_on_paper, parameters_by_part, rank_memory, step_traffic
from .preparation import Plan
from .run_folder import refuse_unusable, standing
from .tables import bytes_text

MEMORY_NAMES = {
    "weights": "weights", "gradients": "gradients", "optimizer_state": "optimizer state", "gathered": "weights of a pass",
    "messages": "message buffers", "activations": "activations (estimate)", "loss": "loss (estimate)",
    "host_weights": "in CPU memory: weights", "host_gradients": "in CPU memory: gradients",
    "host_optimizer_state": "in CPU memory: optimizer state",
}


def dry_run(config: Config, world: World) -> tuple[str, list[str]]:
    """What a run will need, as a table, and what a start would refuse, a sentence each; of the world only size and kind of device matter.

    UserError where the config and its data do not fit together, so that there is nothing to cost.
    """
    ranks, device = world.size, world.device.type
    plan = Plan.make(config, world)
    model = model_on_paper(plan.model)
    number = config.engine.dtype(world.device).itemsize
    shares = Shares.of(model, config, plan.objective, ranks)
    memory = rank_memory(shares, plan.model, config, plan.objective, world, plan.total_steps)
    traffic = step_traffic(shares, config, plan.objective, number, plan.accumulation, ranks)
    checkpoint = checkpoint_bytes(shares, config, number)
    most = most_checkpoints(config, plan.total_steps)
    free = shutil.disk_usage(standing(Path(config.run.folder))).free

    engine = f"{config.engine.name}, ZeRO {config.engine.zero_stage}" if config.engine.name == "deepspeed" else config.engine.name
    total = plan.total_steps * plan.tokens_per_step
    epochs = plan.loader.epochs(plan.total_steps * config.batch.global_sequences)
    sources = {"": epochs} if isinstance(epochs, float) else {f" of {name}": count for name, count in epochs.items()}
    epochs = ", ".join(f"{count:.2f} epochs{source}" for source, count in sources.items())
    rows = [
        ("run", config.run.name, f"in {config.run.folder}"),
        ("world", f"{ranks} x {device}", f"{'bf16' if number == 2 else 'fp32'}, {engine}"),
        ("tokenizer", f"{plan.model.vocab_size:,} pieces", f"hash {plan.tokenizer_hash[:12]}"),
        None,
        *((f"parameters, {name}", f"{count:,}", "") for name, count in parameters_by_part(model).items()),
        ("parameters, all", f"{shares.whole:,}", ""),
        None,
        ("batch", f"{config.batch.global_sequences} sequences",
         f"{ranks} ranks x {plan.accumulation} micro-batches x {config.batch.micro_sequences}, of {config.data.sequence_length} tokens"),
        ("tokens", f"{plan.tokens_per_step:,} a step", f"{total:,} in all, {epochs}"),
        ("FLOPs", f"{plan.flops_per_step:.3e} a step",
         f"{plan.flops_per_step * plan.total_steps:.3e} in all, {plan.flops_per_step / plan.tokens_per_step:.3e} a token"),
        ("steps", f"{plan.total_steps:,}", ""),
        None,
        *_memory_rows(memory, plan.accumulation),
        None,
        *((f"sent by a rank in a step, {field.name.replace('_', '-')}", bytes_text(getattr(traffic, field.name)), "")
          for field in fields(traffic) if getattr(traffic, field.name)),
        ("sent by a rank in a step", bytes_text(traffic.bytes), ""),
        None,
        ("checkpoint", bytes_text(checkpoint), f"{most:,} at a time at the most, one of them still being written"),
        ("free where the run's folder is", bytes_text(free), ""),
    ]
    to_come = max(0, most - len(checkpoint_steps(Path(config.run.folder))))
    return _table(rows), _refusals(config, to_come * checkpoint, free)


def most_checkpoints(config: Config, steps: int) -> int:
    """The most checkpoints that a run of so many steps has at a time: the newest, one that is being written, and those that stay."""
    settings = config.checkpoint
    for_ever = steps // settings.keep_every if settings.keep_every else 0
    return min(-(-steps // settings.interval), settings.keep + 1 + for_ever)


def _refusals(config: Config, needed: int, free: int) -> list[str]:
    """needed: bytes of the checkpoints that are still to be written."""
    found = []
    try:
        refuse_unusable(config)
    except UserError as error:
        found.append(str(error))
    if free < needed:
        found.append(
            f"the checkpoints to come of {config.run.folder} need {bytes_text(needed)} and {bytes_text(free)} are free there: free some, "
            "lower checkpoint.keep, or choose a run.folder on another disk"
        )
    return found


def _memory_rows(memory: Memory, accumulation: int) -> list[tuple[str, str, str]]:
    kinds = {name: getattr(memory, key) for key, name in MEMORY_NAMES.items()}
    rows = [(f"memory of a rank, {name}", bytes_text(count), "") for name, count in kinds.items() if count]
    host = f", and {bytes_text(memory.host_bytes)} of the CPU" if memory.host_bytes else ""
    peak = f"at its peak (estimate), as gradients come while activations go{host}"
    return [*rows, ("memory of a rank", bytes_text(memory.peak(accumulation)), peak)]


def _table(rows: list[tuple[str, str, str] | None]) -> str:
    """Rows in columns; None is an empty line."""
    widths = [max(len(row[column]) for row in rows if row) for column in (0, 1)]
    lines = ("" if row is None else f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip() for row in rows)
    return "\n".join(lines)
