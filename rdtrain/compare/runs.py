"""A run as a comparison sees it: what it is, what it cost, and its held-out NLL as it went, all from its own folder."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, load_config
from ..errors import UserError
from ..metrics import read_metrics


@dataclass
class Arm:
    """One run as the report shows it. Times in seconds, memory in bytes, NLL in nats per token. settings: all that decides its result but
    the seed, as text: runs with the same are repetitions of each other. validation_hash: of the shards that it was evaluated on, and
    step_parts: what a step's time goes to, in the mean, by name; None for a run that did not record it. until_nll: where it was to end, if
    that was asked for."""

    name: str
    objective: str
    settings: str
    seed: int
    tokenizer_hash: str
    validation_hash: str | None
    folder: str
    machine: str
    ranks: int
    precision: str
    learning_rate: float
    learning_rate_source: str
    parameters: int
    training_flops_per_token: float
    steps: int
    tokens: int
    training_flops: float
    seconds: float
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    validation_nll: float
    validation_bits_per_byte: float
    step_parts: dict[str, float] | None
    until_nll: float | None
    curve: list[tuple[float, float, float]]
    """(training FLOPs, seconds, held-out NLL) of each evaluation."""


def read_arm(folder: Path) -> Arm:
    """The run in a folder. UserError where there is none, it has not been evaluated, or its records are of another version."""
    try:
        return _read_arm(folder)
    except KeyError as error:
        raise UserError(f"the records of {folder} have no {error.args[0]}: compare it with the version of rdtrain that wrote it") from None


def _read_arm(folder: Path) -> Arm:
    try:
        facts = json.loads((folder / "run.json").read_text())
        facts["tokens_per_step"]
        records = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder} is not a run that has trained (no whole run.json and metrics.jsonl): give run folders") from None
    config = load_config(folder / "config.yaml")
    evaluated = [record for record in records if "validation_nll" in record]
    timed = [record for record in records if "step_seconds" in record]
    if not timed or not evaluated or evaluated[-1]["step"] == 0:
        raise UserError(f"the run in {folder} has not been evaluated since it started: let it train for longer")
    last = evaluated[-1]
    steady = timed[1:] or timed  # the first record holds the start-up: kernels chosen, memory first touched
    step_seconds = statistics.median(record["step_seconds"] for record in steady)
    return Arm(
        name=facts["name"],
        objective=_objective(config),
        settings=json.dumps(config.result_settings() | {"seed": None}),
        seed=config.run.seed,
        tokenizer_hash=facts["tokenizer_hash"],
        validation_hash=facts.get("validation_hash"),
        folder=str(folder),
        machine=facts["machine"],
        ranks=facts["ranks"],
        precision=facts["precision"],
        learning_rate=config.optimizer.learning_rate,
        learning_rate_source=config.optimizer.learning_rate_source,
        parameters=facts["parameters"],
        training_flops_per_token=facts["training_flops_per_token"],
        steps=last["step"],
        tokens=last["tokens"],
        training_flops=last["training_flops"],
        seconds=last["seconds"],
        step_seconds=step_seconds,
        tokens_per_second=facts["tokens_per_step"] / step_seconds,
        peak_memory_bytes=max(record["peak_memory_bytes"] for record in timed),
        validation_nll=last["validation_nll"],
        validation_bits_per_byte=last["validation_bits_per_byte"],
        step_parts=_step_parts(steady),
        until_nll=config.schedule.until_nll,
        curve=[(record["training_flops"], record["seconds"], record["validation_nll"]) for record in evaluated],
    )


def _step_parts(records: list[dict]) -> dict[str, float] | None:
    """What the time of a step goes to, in seconds, which add up to its mean over the records that have its forward passes."""
    timed = [record for record in records if record.get("forward_seconds") is not None]
    if not timed:
        return None
    whole, waiting, passes = (
        statistics.mean(record[name] for record in timed) for name in ("step_seconds", "data_wait_seconds", "forward_seconds")
    )
    return {"waiting for data": waiting, "forward passes": passes, "the rest": whole - waiting - passes}


def _objective(config: Config) -> str:
    """The objective as the report names it."""
    objective = config.objective
    if objective.name == "diffusion_blocks":
        changes = [name.replace("_", " ") for name in ("self_conditioning", "chain_states", "core_readout") if getattr(objective, name)]
        return ", ".join([objective.name, *changes] + [f"{config.model.blocks} blocks"] * (config.model.blocks > 1))
    if objective.name == "one_pass":
        return objective.name
    last = f" {objective.trained_iterations}" if objective.gradient == "truncated" else ""
    depth = "Poisson depth" if objective.depth == "poisson" else "depth"
    again = ", activation checkpointing" if objective.activation_checkpointing else ""
    return f"bptt {objective.gradient}{last}, {depth} {config.model.iterations}{again}"
