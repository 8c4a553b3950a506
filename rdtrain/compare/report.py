"""The report of a comparison: what a token costs, how fast it goes, what memory it takes, and what held-out NLL the compute has bought.

Nothing is computed anew, and between two evaluations of a run nothing is said to be known. Times come from the same machine only if the
runs did, so the report names each run's machine.
"""

import json
import re
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..data.output import write_atomically
from ..errors import UserError
from ..html_page import write_html
from ..tables import markdown_lines
from .plots import plot_nll, plot_parts
from .runs import Arm, read_arm


def compare(folders: list[Path], output: Path, more: str = "") -> str:
    """Write report.md, the same as one file report.html, report.json, nll-against-flops.png, nll-against-time.png and, where a run has
    recorded it, step-time.png to `output`; returns the report's text. more: Markdown for its end.

    UserError when a folder holds no run, or a run without an evaluation, and for runs of different tokenizers or validation shards.
    """
    arms = [read_arm(folder) for folder in folders]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise UserError(f"two of the runs have the same name ({', '.join(names)}): give each its own run.name")
    for other in arms:
        if other.tokenizer_hash != arms[0].tokenizer_hash:
            raise UserError(
                f"{arms[0].name} was trained with tokenizer {arms[0].tokenizer_hash[:12]} and {other.name} with "
                f"{other.tokenizer_hash[:12]}, so that an NLL per token of one says nothing about the other: compare runs of one tokenizer"
            )
    evaluated = {arm.validation_hash: arm.name for arm in arms if arm.validation_hash}
    if len(evaluated) > 1:
        raise UserError(
            f"{' and '.join(list(evaluated.values())[:2])} were evaluated on different validation shards, so that their held-out NLLs say "
            "nothing about each other: compare runs of one data.validation, or measure them with rdtrain evaluate"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        plot_nll(arms, 0, "training FLOPs", output / "nll-against-flops.png")
        plot_nll(arms, 1, "training time (s)", output / "nll-against-time.png")
        parts = {arm.name: arm.step_parts for arm in arms if arm.step_parts is not None}
        if parts:
            plot_parts(parts, "seconds", "Where the time of a step goes", output / "step-time.png", add_up=True)
        report = _report(arms) + more
        write_atomically(output / "report.json", json.dumps([asdict(arm) for arm in arms], indent=2) + "\n")
        write_atomically(output / "report.md", report)
        write_html(output / "report.md")
    except OSError as error:
        raise UserError(f"the report cannot be written to {output} ({error.strerror}): choose another --output") from None
    return report


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
    table = markdown_lines(header, ([label, *map(value, arms)] for label, value in rows))
    text = ["# Comparison", "", *headline(arms), *table, "", *_ratios(arms)]
    text += ["## Held-out NLL against training FLOPs", "", *_curves(arms), ""]
    text += [f"![held-out NLL against training {name}](nll-against-{name.lower()}.png)\n" for name in ("FLOPs", "time")]
    text += [
        "Held-out NLL is taken from pure noise for denoising blocks (one iteration at sigma_max) and after all K iterations for an "
        "unrolled model, never from a noised target. Peak memory is what the process holds above its size at the start on CPU, and "
        "what PyTorch allocated on CUDA. FLOPs count recurrence: parts that carry gradient three times, iterations without gradient "
        "once, the mean where the depth is drawn; what activation checkpointing computes again is not counted.",
        "",
        *_step_time(arms),
    ]
    return "\n".join(text)


def _step_time(arms: list[Arm]) -> list[str]:
    """Where a step's time went, of the arms that recorded it."""
    recorded = [arm for arm in arms if arm.step_parts is not None]
    if not recorded:
        return []
    header = ["arm", "ms a step, mean", *recorded[0].step_parts]
    rows = []
    for arm in recorded:
        whole = sum(arm.step_parts.values())
        parts = [f"{1000 * seconds:.1f} ({seconds / whole:.0%})" for seconds in arm.step_parts.values()]
        rows.append([arm.name, f"{1000 * whole:.1f}", *parts])
    text = [
        "## Where the time of a step goes", "", *markdown_lines(header, rows), "",
        "![where the time of a step goes](step-time.png)", "",
        "Milliseconds, and shares of the step, as the runs recorded them after their first record. Forward passes are those of the steps "
        "that were logged. The rest is backward passes, messages between ranks, the optimizer, and what the host does in between. Of "
        "several ranks, waiting and passes are those of the rank where they take longest.",
    ]
    if len(recorded) < len(arms):
        text.append(f"Not recorded by {', '.join(arm.name for arm in arms if arm.step_parts is None)}.")
    return [*text, ""]


def headline(arms: list[Arm]) -> list[str]:
    """For each objective but the first run's: what it takes runs like the first to come to the NLL that the other's best runs end with."""
    groups = list(repetitions(arms).values())
    own = [group for group in groups if group[0].objective == arms[0].objective]
    text = []
    for objective in dict.fromkeys(arm.objective for arm in arms):
        others = [group for group in groups if group[0].objective == objective]
        if objective != arms[0].objective:
            text += [_race(own, min(others, key=lambda group: statistics.mean(arm.validation_nll for arm in group))), ""]
    return text


def _race(own: list[list[Arm]], other: list[Arm]) -> str:
    """The run whose first evaluation at or below the mean NLL that the other ends with came soonest, if all seeds of it got there."""
    goal = max([statistics.mean(arm.validation_nll for arm in other), *(arm.until_nll for arm in other if arm.until_nll is not None)])
    goal_text = f"the {goal:.4f} that {_name(other)} has after {mean([arm.seconds for arm in other], '.1f')} s"
    goal_text += spread([arm.validation_nll for arm in other], ".4f")
    raced = []
    for group in own:
        reached = [next(((flops, seconds, nll) for flops, seconds, nll in arm.curve if nll <= goal), None) for arm in group]
        if None not in reached:
            raced.append((statistics.mean(seconds for _, seconds, _ in reached), reached, group))
    if not raced:
        return f"**{' and '.join(_name(group) for group in own)}: never down to {goal_text}.**"
    _, reached, group = min(raced, key=lambda race: race[0])
    flops, seconds = (
        [point[column] / statistics.mean(getattr(arm, name) for arm in other) for point in reached]
        for column, name in ((0, "training_flops"), (1, "seconds"))
    )
    had, after = mean([nll for _, _, nll in reached], ".4f"), mean([seconds for _, seconds, _ in reached], ".1f")
    return (
        f"**{_name(group)} had {had} after {after} s: {statistics.mean(seconds):.3f} of the time and {statistics.mean(flops):.3f} of the "
        f"training FLOPs to {goal_text}.**" + spread(seconds, ".3f", " of the time")
    )


def repetitions(arms: list[Arm]) -> dict[str, list[Arm]]:
    """The runs that differ in their seed alone, by their settings."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.settings, []).append(arm)
    return groups


def _name(group: list[Arm]) -> str:
    """What repeated runs are called together."""
    return group[0].name if len(group) == 1 else re.sub(r"[, -]*seed[ -]*\d+$", "", group[0].name)


def mean(values: list[float], digits: str) -> str:
    """A mean, in a format."""
    return format(statistics.mean(values), digits)


def spread(values: list[float], digits: str, unit: str = "") -> str:
    """Of how many seeds a mean is, and from where to where they go."""
    if len(values) == 1:
        return ""
    return f" ({len(values)} seeds, {min(values):{digits}} to {max(values):{digits}}{unit})"


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
            f"held-out NLL came to {_within(first, budget):.4f} for {first.name} and {_within(other, budget):.4f} for {other.name}.",
            "",
        ]
    return text


def _within(arm: Arm, flops: float) -> float:
    """The held-out NLL of the last evaluation within a number of training FLOPs."""
    return [nll for budget, _, nll in arm.curve if budget <= flops * (1 + 1e-9)][-1]


def _curves(arms: list[Arm], points: int = 8) -> list[str]:
    budget = min(arm.training_flops for arm in arms)
    header = ["training FLOPs", *(arm.name for arm in arms)]
    rows = [
        [f"{flops:.4g}", *(f"{_within(arm, flops):.4f}" for arm in arms)]
        for flops in np.linspace(budget / points, budget, points)
    ]
    return markdown_lines(header, rows)
