"""The README's results, from the measurements that docs/results holds: `python -m rdtrain.compare.results_table` writes them anew.

From quality.json (runs of `launch/quality.sh arms`, each with the commit that it was made at), ablations.json and the first table of
quickstart.md. Notable: runs of one commit on one kind of machine were made on one day, and no ratio is formed of others.
"""

import json
import re
import statistics
import textwrap
from dataclasses import fields
from pathlib import Path

from ..data.output import write_atomically
from ..errors import UserError, user_errors_as_exit
from ..tables import bytes_text, markdown_lines
from .report import headline, mean, repetitions, spread
from .runs import Arm

PROJECT = Path(__file__).parent.parent.parent
START, END = "<!-- made by python -m rdtrain.compare.results_table -->", "<!-- until here -->"
NAMES = {"diffusion_blocks": "denoising blocks", "bptt truncated": "truncated BPTT", "bptt full": "full BPTT", "bptt local": "local BPTT"}
# By `rdtrain compare` at 30058de, where no run was to end by its NLL.
UNRECORDED = {"settings": "", "seed": 0, "tokenizer_hash": "", "validation_hash": None, "step_parts": None, "until_nll": None}
ABLATION_STEP_TOKENS = 64 * 512  # configs/70m.yaml


def results(project: Path) -> str:
    """What stands between the README's markers. UserError where a measurement is missing or cannot be read."""
    folder = project / "docs/results"
    try:
        days = _days(json.loads((folder / "quality.json").read_text()))
        table = _table(days)
        points = [*_ratios(days), _iterations(json.loads((folder / "ablations.json").read_text()))]
        points.append(_quickstart((folder / "quickstart.md").read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the measurements in {folder} cannot be read ({error}): restore them from the repository") from None
    wrapped = [textwrap.fill(f"- {point}", 140, subsequent_indent="  ", break_on_hyphens=False) for point in points]
    return "\n".join([table, "", *wrapped])


def write(readme: Path, text: str) -> None:
    """Put the text between the README's markers. UserError where they are not there once each, in this order."""
    before = readme.read_text() if readme.is_file() else ""
    parts = re.split(f"({re.escape(START)}|{re.escape(END)})", before)
    if parts[1::2] != [START, END]:
        raise UserError(f"{readme} has no place for results: put the lines `{START}` and `{END}` where they belong")
    write_atomically(readme, f"{parts[0]}{START}\n\n{text}\n\n{END}{parts[4]}")


def _days(rows: list[dict]) -> dict[tuple[str, str], list[Arm]]:
    """The runs by commit and machine, those that the file lists last first, and of these the ones that have the last runs of some
    objective. A run is called by its objective; runs whose names differ in the seed alone are repetitions."""
    days = {}
    for row in reversed(rows):
        kind = re.match(r"bptt \w+|\w+", row["objective"])[0]
        found = UNRECORDED | row | {"name": NAMES[kind], "settings": re.sub(r"-seed-\d+$", "", row["name"])}
        day = days.setdefault((row["commit"], f"{row['ranks']} {row['machine']}"), [])
        day.append(Arm(**{each.name: found[each.name] for each in fields(Arm)}))
    order, seen, newest = list(NAMES.values()), set(), {}
    for day, arms in days.items():
        names = {arm.name for arm in arms}
        if not names <= seen:
            newest[day] = sorted(arms, key=lambda arm: (order.index(arm.name), arm.seconds))
        seen |= names
    return newest


def _table(days: dict[tuple[str, str], list[Arm]]) -> str:
    header = ["arm", "commit", "seconds", "tokens", "training FLOPs", "peak memory", "held-out NLL (nats/token)"]
    rows = [
        [
            runs[0].name, commit, mean([run.seconds for run in runs], ".0f"), f"{statistics.mean(run.tokens for run in runs) / 1e6:.1f}M",
            mean([run.training_flops for run in runs], ".2e").replace("e+", "e"), bytes_text(max(run.peak_memory_bytes for run in runs)),
            f"**{mean([run.validation_nll for run in runs], '.3f')}**{spread([run.validation_nll for run in runs], '.3f')}",
        ]
        for (commit, _), arms in days.items() for runs in repetitions(arms).values()
    ]
    return "\n".join(markdown_lines(header, rows))


def _ratios(days: dict[tuple[str, str], list[Arm]]) -> list[str]:
    """What the blocks needed for the NLL that each other objective ends with, of each day by itself."""
    return [
        f"At {commit}, {machine}: {line.strip('*')}" for (commit, machine), arms in days.items() for line in headline(arms) if line
    ]


def _iterations(ablations: dict[str, dict]) -> str:
    """What K iterations at inference change, of ours at both seeds."""
    ours = [ablations["ours"], ablations["seed-2"]]
    one, many = (" and ".join(f"{run[k]:.3f}" for run in ours) for k in ("1", "32"))
    return (
        f"Iterations at inference: after {ours[0]['tokens'] // ABLATION_STEP_TOKENS} steps of two seeds the bound on the blocks' NLL is "
        f"{one} with one iteration and {many} with 32 (standard error over sequences {ours[0]['error']:.3f})."
    )


def _quickstart(page: str) -> str:
    """The end of the quickstart, from its page: a line with commit and machine, and below it the first table."""
    commit, day, machine = re.search(r"^commit (\w+), ([\d-]+), ([^,]+)", page, re.M).groups()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    first = {row[0]: row[1:] for row in reversed(rows)}  # of rows with the same name, that of the first table
    ends = " and ".join(f"{float(value):.3f} for {arm}" for arm, value in zip(rows[0][1:], first["held-out NLL at the end"]))
    budgets = " and ".join(f"{float(value):.2e}".replace("e+", "e") for value in first["training FLOPs"])
    return f"The quickstart at {commit}, {day}, {machine}: held-out NLL of {ends}, for {budgets} training FLOPs."


def main() -> None:
    """Rewrite README.md of this checkout."""
    with user_errors_as_exit():
        write(PROJECT / "README.md", results(PROJECT))


if __name__ == "__main__":
    main()
