"""The page of what was measured on several GPUs: what docs/results/scaling.md's tables are copied from."""

import argparse
import sys
from pathlib import Path

from ..errors import UserError, user_errors_as_exit
from ..hardware import NETWORK
from ..tables import bytes_text, markdown_lines
from .findings import Findings, Row
from .jobs import room_of

GIB = 2**30
PROJECTED = (8, 64, 512, 1024)


def page(findings: Findings) -> str:
    """The whole page."""
    lines = ["# Scaling, as measured", "", *_facts(findings), "", "## Bars", ""]
    words = {True: "met", False: "**not met**", None: "not measured"}
    lines += markdown_lines(["bar", "found", ""], [[bar.what, bar.found or "-", words[bar.met]] for bar in findings.bars()])
    for model in dict.fromkeys(row.model for row in findings.rows):
        rows = [row for row in findings.rows if row.model == model]
        lines += ["", f"## {model}", "", *_measured(findings, rows), "", *_missing(findings, rows), *_projection(findings, rows)]
    return "\n".join([*lines, "", *_losses(findings), "", *_resume(findings), "", *_tests(findings), ""])


def _facts(findings: Findings) -> list[str]:
    found = next((row.found for row in findings.rows if row.found), None)
    lines = []
    if found is not None:
        versions = ", ".join(f"{name} {version}" for name, version in found["facts"]["versions"].items() if version and name in
                             ("torch", "deepspeed"))
        lines.append(f"{found['facts']['started'][:10]}, commit {found['facts']['commit'] or 'unknown'}, {found['device']}, {versions}.")
    for each in findings.collectives:
        speeds = ", ".join(f"{name.replace('_', '-')} {1e-9 * rate:.1f}" for name, rate in each["bytes_per_second"].items())
        which = f"NCCL {each['nccl']}" if each["nccl"] else each["backend"]
        lines.append(f"{each['ranks']} processes, {which}: collectives right; GB/s that a rank sends in {each['megabytes']} MB: {speeds}.")
    return lines or ["Nothing has been measured."]


def _measured(findings: Findings, rows: list[Row]) -> list[str]:
    header = ["GPUs", "arm", "layout", "sequences", "tokens/s a GPU", "MFU", "ms/step", "predicted ms", "peak GiB", "estimated",
              "exposed ms", "of a step", "sent a step", "weak scaling"]
    made = []
    for row in rows:
        if row.found is None:
            continue
        found, predicted, efficiency = row.found, findings.predicted(row), findings.efficiency(row)
        step, exposed = found["step_seconds"]["typical"], found["exposed_seconds"]
        compiled = ", compiled" if found["engine"]["compile"] else ""
        made.append([
            str(row.gpus), name_of(row), row.layout + compiled, str(row.micro), f"{row.tokens_per_gpu:,.0f}", _percent(found["mfu"]),
            f"{1e3 * step:.1f}", "-" if predicted is None else f"{1e3 * predicted.step_seconds:.1f}",
            f"{found['memory']['peak'] / GIB:.2f}", f"{found['estimate']['peak'] / GIB:.2f}",
            "-" if exposed is None else f"{1e3 * exposed:.1f}",
            "-" if exposed is None else _percent(exposed / step), bytes_text(sum(found["traffic"].values())), _percent(efficiency),
        ])
    if not made:
        return ["Nothing has been measured."]
    sources = sorted({f"{row.objective}: {findings.hfu(row)[1]}" for row in rows if row.found and findings.hfu(row)[0]})
    note = (
        "Predicted times are `rdtrain plan`'s, at the HFU of each arm's own layout on one GPU or, where that was not measured, of another "
        f"({'; '.join(sources) or 'none is known'}). Sequences are of a GPU; weak scaling is of tokens/s a GPU."
    )
    return [*markdown_lines(header, made), "", note]


def name_of(row: Row) -> str:
    """Objective and, untied, blocks."""
    return f"{row.objective}, {row.blocks} untied" if row.blocks > 1 else row.objective


def _missing(findings: Findings, rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        who = f"{name_of(row)}, {row.layout} on {row.gpus}"
        if not row.fits:
            lines.append(f"- {who}: does not fit, by {(row.peak - room_of(findings.gpu)) / GIB:.1f} GiB of the estimate; not tried")
        elif row.found is None:
            lines.append(f"- {who}: " + (f"failed: {row.failed}" if row.failed else "not measured yet"))
    return ["Not in the table:", "", *lines, ""] if lines else []


def _projection(findings: Findings, rows: list[Row]) -> list[str]:
    """By arithmetic, of the layouts that are held to bars."""
    chosen = [row for row in (findings.find(model=rows[0].model, objective="blocks", layout=layout, blocks=1) for layout in
                              ("ZeRO-1", "FSDP2")) if row is not None]
    parallel = [row for row in rows if row.found and row.layout == "block-parallel"]
    chosen += parallel[-1:]
    lines = []
    for row in chosen:
        for gpus in PROJECTED:
            predicted = findings.predicted(row, gpus) if gpus % row.blocks == 0 else None
            if predicted is None:
                continue
            step, tokens = predicted.step_seconds, predicted.global_sequences * findings.config(row, gpus).data.sequence_length
            computing = tokens * (predicted.flops_per_token + predicted.recomputed_per_token) / (
                gpus * 1e12 * findings.gpu.tflops * findings.hfu(row)[0]
            )
            bare = computing + predicted.sending_seconds
            lines.append([
                f"{gpus:,}", name_of(row), row.layout, f"{1e3 * computing:.0f}", f"{1e3 * predicted.sending_seconds:.0f}",
                f"{tokens / step:,.0f}", _percent(computing / step), f"{tokens / bare:,.0f}", _percent(computing / bare),
                f"{predicted.peak / GIB:.1f}",
            ])
    if not lines:
        return []
    header = ["GPUs", "arm", "layout", "computing ms", "sending ms", "tokens/s, all hidden", "weak scaling", "tokens/s, none hidden",
              "weak scaling", "GiB"]
    return [
        "**A projection, not a measurement**, by `rdtrain plan`'s arithmetic at the HFU that one GPU reached: messages that leave a node "
        f"go at {NETWORK:g} GB/s a GPU, in rings without latency, behind computation (all hidden) or after it (none "
        "hidden).",
        "",
        *markdown_lines(header, lines), "",
    ]


def _losses(findings: Findings) -> list[str]:
    lines, found = ["## Losses of the same steps", ""], findings.deviations()
    if found is None:
        return [*lines, "Not compared yet."]
    rows, limit = found
    first = findings.losses[0]
    lines += [f"{first['steps']} steps of {first['config']}, bf16; the largest deviation of a step's loss from plain PyTorch in fp32 on "
              f"one process, relative. The limit is {limit:.1e}.", ""]
    return lines + markdown_lines(["processes", "layout", "deviation"], [[str(ranks), layout, f"{off:.1e}"] for ranks, layout, off in rows])


def _resume(findings: Findings) -> list[str]:
    found = findings.resume
    if found is None:
        return ["## Killed, and gone on elsewhere", "", "Not tried yet."]
    return [
        "## Killed, and gone on elsewhere", "",
        f"{found['steps']} steps under {found['engine']} on {found['ranks']}: rank {found['rank']} was killed (SIGKILL) in or after step "
        f"{found['step_when_killed']}, the launcher ended with {found['launcher_code']}, and the run went on from step "
        f"{found['resumed_from']} under {found['resumed_engine']} on {found['resumed_ranks']}. The next {found['compared_steps']} losses "
        f"are off those of a run that nobody killed by at most {found['largest_deviation']:.1e} (step {found['at_step']}), relative, and "
        f"all to the end by {found['largest_deviation_to_the_end']:.1e}.",
    ]


def _tests(findings: Findings) -> list[str]:
    if not findings.equality:
        return ["## Tests", "", "Not run yet."]
    return ["## Tests", "", *markdown_lines(["test", ""], [[name, word] for name, word in findings.equality.items()])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def main() -> None:
    """Exit code 1 where a bar is not met."""
    parser = argparse.ArgumentParser(prog="python -m rdtrain.scaling.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="of launch/scaling.sh")
    parser.add_argument("output", type=Path, help="the page to write")
    options = parser.parse_args()
    with user_errors_as_exit():
        if not options.folder.is_dir():
            raise UserError(f"there is no folder {options.folder}: measure first, with launch/scaling.sh")
        findings = Findings(options.folder)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page(findings))
        for bar in findings.bars():
            verdict = {True: "met", False: "NOT MET", None: "not measured"}[bar.met]
            print(f"{verdict}: {bar.what}" + (f": {bar.found}" if bar.found else ""))
        print(options.output)
        sys.exit(1 if any(bar.met is False for bar in findings.bars()) else 0)


if __name__ == "__main__":
    main()
