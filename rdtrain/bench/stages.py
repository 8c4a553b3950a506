"""What docs/results/performance.md is written from: `python -m rdtrain.bench.stages FOLDER` collects the stages of launch/performance.sh.

It writes FOLDER/performance.json, a row for each measurement, FOLDER/performance.md, a table for each stage, and FOLDER/STAGE.png, a plot
of each sweep, of one that is not complete too. A row in which the percentiles lie far apart was disturbed: look at it before it is copied.
The rows of an earlier performance.json can be given as well, as a machine may not be there for all stages at once: they come before the new
ones of their stage, and a plot has the last of each arm and value.
"""

import argparse
import json
from pathlib import Path

from ..data.output import write_atomically
from ..errors import UserError, user_errors_as_exit
from ..tables import markdown_lines
from .report import Point, plot_sweep

GIB = 2**30
KINDS = ("peak", "reserved", "weights", "gradients", "optimizer_state", "activations", "passes")
HEADER = [
    "arm", "value", "sequences", "ms a step", "p10 to p90", "tokens/s", "model TFLOP/s", "MFU", "HFU", "peak GiB", "by estimate", "time x",
    "peak x",
]


def collect(folder: Path, earlier: Path | None = None) -> list[dict]:
    """All measurements of the stages in a folder, in ms, TFLOP/s and GiB, behind those of an `earlier` performance.json, stage by stage.
    UserError where there are none, or they cannot be read."""
    rows = []
    for path in [*filter(None, [earlier]), *sorted(folder.glob("*/bench.json"))]:
        try:
            report = json.loads(path.read_text())
            if path == earlier:  # KeyError for what is no such report
                rows += [{name: row[name] for name in ("stage", "swept", "arm", "value")} | row for row in report]
            else:
                found = (_row(path.parent.name, report["swept"], report["facts"], found) for found in report["measurements"])
                rows += [row for row in found if row not in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            mend = "give another" if path == earlier else "remove it, and measure that stage again"
            raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): {mend}") from None
    if not rows:
        raise UserError(f"nothing has been measured in {folder}: start with `bash launch/performance.sh large`")
    return [row for stage in dict.fromkeys(row["stage"] for row in rows) for row in rows if row["stage"] == stage]


def plot_stages(rows: list[dict], folder: Path) -> list[Path]:
    """Plots of the stages that are sweeps."""
    paths = []
    for stage in dict.fromkeys(row["stage"] for row in rows if row["swept"]):
        of_stage = [row for row in rows if row["stage"] == stage]
        last = {(row["arm"], row["value"]): row for row in of_stage}.values()
        points = [Point(row["arm"], row["value"], *_found(row)) for row in last]
        paths.append(folder / f"{stage}.png")
        plot_sweep(points, of_stage[0]["swept"], paths[-1])
    return paths


def _found(row: dict) -> tuple[float, float] | tuple[None, None]:
    """Seconds a token and peak bytes, as a `Point` has them."""
    return (None, None) if row.get("out_of_memory") else (1 / row["tokens_per_second"], GIB * row["peak"])


def _row(stage: str, swept: str | None, facts: dict, found: dict) -> dict:
    facts = facts | {name: found[name] for name in ("commit", "started") if name in found}  # of its own, where a later command kept it
    row = {
        "stage": stage, "swept": swept, "commit": facts["commit"], "day": facts["started"][:10], "device": found["device"],
        "torch": facts["versions"]["torch"],
        **{name: found[name] for name in ("arm", "value", "micro_sequences", "sequence_length")},
        "estimated_peak": round(found["estimate"]["peak"] / GIB, 2),
    }
    if found["out_of_memory"]:
        return row | {"out_of_memory": True}
    steps = found["step_seconds"]
    row |= {name: round(1e3 * steps[key], 2) for name, key in (("ms", "typical"), ("p10", "p10"), ("p90", "p90"))}
    row |= {f"{name}_ms": found[f"{key}_seconds"] and round(1e3 * found[f"{key}_seconds"], 1)
            for name, key in (("busy", "busy"), ("host", "enqueue"))}
    row |= {"tokens_per_second": round(found["tokens_per_second"]), "tflops": round(1e-12 * found["model_flops_per_second"], 1)}
    row |= {name: found[name] and round(found[name], 4) for name in ("mfu", "hfu")}
    return row | {kind: round(found["memory"][kind] / GIB, 2) for kind in KINDS if found["memory"].get(kind) is not None}


def page(rows: list[dict]) -> str:
    """Markdown: a table for each stage, of which the last columns are multiples of the first arm's at the same value."""
    lines = ["# Speed and memory on one GPU, as measured", ""]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == stage]
        first = of_stage[0]
        lines += [f"## {stage}", "", f"    bash launch/performance.sh {stage.split('-')[0]}", ""]
        lines += [f"{first['day']}, commit {first['commit'] or 'unknown'}, {first['device']}, torch {first['torch']}.", ""]
        lines += [*markdown_lines(HEADER, (_cells(row, of_stage) for row in of_stage)), ""]
    return "\n".join(lines)


def _cells(row: dict, of_stage: list[dict]) -> list[str]:
    cells = [row["arm"], row["value"] or "", f"{row['micro_sequences']} x {row['sequence_length']:,}"]
    if row.get("out_of_memory"):
        return [*cells, "out of memory", *[""] * 6, f"{row['estimated_peak']}", "", ""]
    first = (other for other in of_stage if (other["arm"], other["value"]) == (of_stage[0]["arm"], row["value"]))
    base = next(first, {"out_of_memory": True})  # or not measured at this value
    times = ["", ""] if base.get("out_of_memory") else [
        f"{base['tokens_per_second'] / row['tokens_per_second']:.2f}", f"{row['peak'] / base['peak']:.2f}" if base.get("peak") else "",
    ]
    shares = ["-" if row[name] is None else f"{100 * row[name]:.1f}%" for name in ("mfu", "hfu")]
    cells += [f"{row['ms']:,.1f}", f"{row['p10']:,.1f} to {row['p90']:,.1f}", f"{row['tokens_per_second']:,}", f"{row['tflops']:,.1f}"]
    return [*cells, *shares, f"{row['peak']}", f"{row['estimated_peak']}", *times]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rdtrain.bench.stages", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where launch/performance.sh has put its stages (FOLDER, runs/performance)")
    parser.add_argument("earlier", type=Path, nargs="?", help="a performance.json, such as docs/results/performance.json")
    given = parser.parse_args()
    with user_errors_as_exit():
        rows = collect(given.folder, given.earlier)
        listed = ",\n ".join(json.dumps(row) for row in rows)
        for name, text in (("performance.json", f"[\n {listed}\n]\n"), ("performance.md", page(rows))):
            write_atomically(given.folder / name, text)
            print(given.folder / name)
        for path in plot_stages(rows, given.folder):
            print(path)


if __name__ == "__main__":
    main()
