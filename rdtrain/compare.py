"""Runs side by side: what a token costs, how fast it goes, what memory it takes, and what held-out NLL the compute has bought.

Everything is read from the run folders (run.json, config.yaml, metrics.jsonl); nothing is computed anew. Times come from the same
machine only if the runs did, so the report names each run's machine.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .config import Config, load_config
from .data.output import write_atomically
from .errors import UserError
from .metrics import read_metrics


@dataclass
class Arm:
    """One run as the report shows it. Times in seconds, memory in bytes, NLL in nats per token."""

    name: str
    objective: str
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
    curve: list[tuple[float, float, float]]
    """(training FLOPs, seconds, held-out NLL) of each evaluation."""


def compare(folders: list[Path], output: Path) -> str:
    """Write report.md, report.json, nll-against-flops.png and nll-against-time.png to `output`; returns the report's text.

    UserError when a folder holds no run, or a run without an evaluation.
    """
    arms = [_read_arm(folder) for folder in folders]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise UserError(f"two of the runs have the same name ({', '.join(names)}): give each its own run.name")
    try:
        output.mkdir(parents=True, exist_ok=True)
        _plot(arms, 0, "training FLOPs", output / "nll-against-flops.png")
        _plot(arms, 1, "training time (s)", output / "nll-against-time.png")
        report = _report(arms)
        write_atomically(output / "report.json", json.dumps([asdict(arm) for arm in arms], indent=2) + "\n")
        write_atomically(output / "report.md", report)
    except OSError as error:
        raise UserError(f"the report cannot be written to {output} ({error.strerror}): choose another --output") from None
    return report


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
    # The first record holds the start-up: kernels chosen, memory first touched.
    step_seconds = statistics.median(record["step_seconds"] for record in timed[1:] or timed)
    return Arm(
        name=facts["name"],
        objective=_objective(config),
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
        curve=[(record["training_flops"], record["seconds"], record["validation_nll"]) for record in evaluated],
    )


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


def _report(arms: list[Arm]) -> str:
    rows = [
        ("objective", lambda arm: arm.objective),
        ("learning rate", lambda arm: f"{arm.learning_rate:g}"),
        ("learning rate chosen in", lambda arm: arm.learning_rate_source or "not recorded"),
        ("parameters", lambda arm: f"{arm.parameters:,}"),
        ("training FLOPs per token", lambda arm: f"{arm.training_flops_per_token:.4g}"),
        ("steps", lambda arm: f"{arm.steps:,}"),
        ("tokens", lambda arm: f"{arm.tokens:,}"),
        ("training FLOPs", lambda arm: f"{arm.training_flops:.4g}"),
        ("training time (s)", lambda arm: f"{arm.seconds:.1f}"),
        ("step time, median (s)", lambda arm: f"{arm.step_seconds:.3f}"),
        ("tokens/s", lambda arm: f"{arm.tokens_per_second:,.0f}"),
        ("peak memory per rank (MiB)", lambda arm: f"{arm.peak_memory_bytes / 2**20:,.0f}"),
        ("held-out NLL (nats/token)", lambda arm: f"**{arm.validation_nll:.4f}**"),
        ("held-out bits per byte", lambda arm: f"{arm.validation_bits_per_byte:.4f}"),
        ("machine", lambda arm: f"{arm.machine}, {arm.ranks} ranks, {arm.precision}"),
    ]
    header = ["", *(arm.name for arm in arms)]
    table = [header, ["---"] * len(header)] + [[label, *map(value, arms)] for label, value in rows]
    text = ["# Comparison", "", _lines(table), ""]
    text += _ratios(arms)
    text += ["## Held-out NLL against training FLOPs", "", _lines(_curves(arms)), ""]
    text += [f"![held-out NLL against training {name}](nll-against-{name.lower()}.png)\n" for name in ("FLOPs", "time")]
    text += [
        "Held-out NLL is taken from pure noise for denoising blocks (one iteration at sigma_max) and after all K iterations for an "
        "unrolled model, never from a noised target. Peak memory is what the process holds above its size at the start on CPU, and "
        "what PyTorch allocated on CUDA. FLOPs count recurrence: parts that carry gradient three times, iterations without gradient "
        "once, the mean where the depth is drawn; what activation checkpointing computes again is not counted.",
        "",
    ]
    return "\n".join(text)


def _lines(table: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def _ratios(arms: list[Arm]) -> list[str]:
    """What each arm with another objective costs against the first one."""
    first = arms[0]
    text = []
    for other in [arm for arm in arms[1:] if arm.objective != first.objective]:
        budget = min(first.training_flops, other.training_flops)
        text += [
            f"{other.name} costs {other.training_flops_per_token / first.training_flops_per_token:.2f} times the training FLOPs a token "
            f"of {first.name}, {first.tokens_per_second / other.tokens_per_second:.2f} times the time a token and "
            f"{other.peak_memory_bytes / max(first.peak_memory_bytes, 1):.2f} times the peak memory. Within {budget:.4g} training FLOPs, "
            f"held-out NLL came to {_within(first, budget):.4f} for {first.name} and {_within(other, budget):.4f} for {other.name}. "
            + _race([arm for arm in arms if arm.objective == first.objective], other),
            "",
        ]
    return text


def _race(alike: list[Arm], other: Arm) -> str:
    """The earliest evaluation of any of these arms that was no worse than the NLL that the other ends with; between evaluations nothing
    is known."""
    goal = f"the {other.validation_nll:.4f} that {other.name} has after {other.seconds:.1f} s"
    reached = [(seconds, nll, arm.name) for arm in alike for _, seconds, nll in arm.curve if nll <= other.validation_nll]
    if not reached:
        return f"{' and '.join(arm.name for arm in alike)}: never down to {goal}."
    seconds, nll, name = min(reached)
    return f"{name} had {nll:.4f} after {seconds:.1f} s, {seconds / other.seconds:.3f} of the time to {goal}."


def _within(arm: Arm, flops: float) -> float:
    """The held-out NLL of the last evaluation within a number of training FLOPs."""
    return [nll for budget, _, nll in arm.curve if budget <= flops * (1 + 1e-9)][-1]


def _curves(arms: list[Arm], points: int = 8) -> list[list[str]]:
    budget = min(arm.training_flops for arm in arms)
    header = ["training FLOPs", *(arm.name for arm in arms)]
    rows = [
        [f"{flops:.4g}", *(f"{_within(arm, flops):.4f}" for arm in arms)]
        for flops in np.linspace(budget / points, budget, points)
    ]
    return [header, ["---"] * len(header), *rows]


def _plot(arms: list[Arm], column: int, label: str, path: Path) -> None:
    """Held-out NLL against a column of the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for arm in arms:
        x, nll = [point[column] for point in arm.curve], [point[-1] for point in arm.curve]
        axes.plot(x, nll, marker="o", markersize=3, label=f"{arm.name} (learning rate {arm.learning_rate:g})")
    axes.set(xlabel=label, ylabel="held-out NLL (nats per token)", title=f"Held-out NLL against {label}")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
    temporary.replace(path)
