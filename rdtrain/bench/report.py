"""Measurements as people read them: two tables, the costliest kernels, and a plot of a sweep."""

from dataclasses import dataclass
from pathlib import Path

from ..data.output import write_figure
from ..tables import bytes_text, columns
from .measure import Measurement

GIB = 2**30


def tables(rows: list[Measurement], swept: str | None) -> str:
    """Time, memory and kernels of all measurements, and what has to be said beside the numbers. swept: the key of a sweep."""
    parts = [_time(rows, swept), _memory(rows, swept)]
    parts += [_kernels(row, swept) for row in rows if row.kernels]
    return "\n\n".join([*parts, *_notes(rows, swept)])


def name_of(row: Measurement, swept: str | None) -> str:
    """The arm and, in a sweep, the value."""
    return row.arm if row.value is None else f"{row.arm}, {swept}={row.value}"


def ratio(row: Measurement, rows: list[Measurement], measure) -> float | None:
    """How many times the first arm's measure, at the same value of a sweep, a row has, or of a single arm the first value's; None where
    one of them has none."""
    single = len({other.arm for other in rows}) == 1
    first = next(other for other in rows if single or other.value == row.value)
    if first.out_of_memory or row.out_of_memory or not measure(first):
        return None
    return measure(row) / measure(first)


def seconds_per_token(row: Measurement) -> float:
    """Of all ranks together."""
    return 1 / row.tokens_per_second


def _time(rows: list[Measurement], swept: str | None) -> str:
    header = [
        "", "ms/step", "p10 to p90", "tokens/s", "model TFLOP/s", "MFU", "HFU", "host ms", "busy ms", "bound by", "compile s", "time x",
    ]
    several = any(row.ranks > 1 for row in rows)
    header += ["message ms", "exposed ms", "sent"] * several
    lines = []
    for row in rows:
        if row.out_of_memory:
            lines.append([name_of(row, swept), "out of memory"] + [""] * (len(header) - 2))
            continue
        step = row.step_seconds
        lines.append([
            name_of(row, swept), f"{1e3 * step['typical']:.1f}", f"{1e3 * step['p10']:.1f} to {1e3 * step['p90']:.1f}",
            f"{row.tokens_per_second:,.0f}", f"{1e-12 * row.model_flops_per_second:.3g}", _share(row.mfu), _share(row.hfu),
            _ms(row.enqueue_seconds), _ms(row.busy_seconds), {None: "-", True: "host", False: "device"}[row.host_bound],
            "-" if row.compile_seconds is None else f"{row.compile_seconds:.1f}", _times(ratio(row, rows, seconds_per_token)),
            *[_ms(row.message_seconds), _ms(row.exposed_seconds), bytes_text(sum(row.traffic.values()))] * several,
        ])
    return columns([header, *lines])


def _memory(rows: list[Measurement], swept: str | None) -> str:
    kinds = ("peak", "reserved", "weights", "gradients", "optimizer_state", "activations", "passes", "host")
    shown = [kind for kind in kinds if kind != "host" or any(row.memory.get("host") for row in rows)]
    names = {"host": "in CPU memory"}
    header = ["GiB", *(names.get(kind, kind.replace("_", " ")) for kind in shown), "peak by estimate", "peak x"]
    lines = []
    for row in rows:
        found = [_gib(row.memory.get(kind)) for kind in shown]
        if row.out_of_memory:
            found[0] = "out of memory"
        lines.append([name_of(row, swept), *found, _gib(row.estimate["peak"]), _times(ratio(row, rows, lambda row: row.memory["peak"]))])
    return columns([header, *lines])


def _kernels(row: Measurement, swept: str | None) -> str:
    what = "kernels" if row.busy_seconds is not None else "operators"
    lines = [[f"{name_of(row, swept)}: costliest {what}", "ms/step", "share", "calls"]]
    for kernel in row.kernels:
        name = kernel["name"] if len(kernel["name"]) <= 90 else kernel["name"][:87] + "..."
        lines.append([name, f"{1e3 * kernel['seconds']:.2f}", _share(kernel["share"]), f"{kernel['calls']:g}"])
    return columns(lines)


def _notes(rows: list[Measurement], swept: str | None) -> list[str]:
    first, ran, notes = rows[0], [row for row in rows if not row.out_of_memory], []
    paper = next((row.peak_flops_per_second for row in ran if row.peak_flops_per_second), None)
    kernels = sorted({name for row in rows for name in row.attention_kernels})
    found = f" ({', '.join(kernels)})" if kernels and first.device != "cpu" else ""
    how = "; ".join(dict.fromkeys(f"{row.precision}, attention by {row.attention}" for row in rows))  # which a sweep may change
    notes.append(f"{first.ranks} x {first.device}, {how}{found}.")
    if first.device == "cpu":
        notes.append(
            "On the CPU there is no MFU, and no host apart from the device. Memory is what PyTorch's allocator handed out in a step, with "
            "weights and optimizer state; what it reserves, and buffers that an engine keeps from step to step, are not known."
        )
    elif paper is None and ran:
        why = "its speed on paper is not known" if first.precision == "bfloat16" else f"peaks are of bf16, and this is {first.precision}"
        notes.append(f"MFU and HFU: none, as {why}.")
    elif ran:
        notes.append(f"MFU and HFU are shares of {1e-12 * paper:,.1f} TFLOP/s (bf16, dense, on paper).")
        if any(row.engine["precision"] == "fp8" for row in rows):
            notes[-1] += " Of arms in fp8 too, which may have more than all of it."
        if any(row.busy_seconds is None for row in ran):
            notes.append("The profiler saw no kernels, so how long the device is busy, and what bounds a step, is not known.")
    skipped = [name_of(row, swept) for row in rows if row.skipped_steps]
    if skipped:
        notes.append(f"Steps were skipped, as their loss or gradient was not finite: {', '.join(skipped)}.")
    notes += [f"{name_of(row, swept)}: out of memory: {row.out_of_memory}" for row in rows if row.out_of_memory]
    files = [file for row in rows for file in row.files]
    return notes + ([f"Written: {', '.join(files)}"] if files else [])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _gib(count: float | None) -> str:
    return "-" if count is None else f"{count / GIB:.2f}" if count >= GIB / 10 else f"{count / GIB:.4f}"


def _times(times: float | None) -> str:
    return "-" if times is None else f"{times:.2f}"


@dataclass
class Point:
    """What a plot shows of a measurement: seconds a token, of all ranks together, and peak bytes; None for both where memory ran out."""

    arm: str
    value: str
    seconds: float | None
    peak: float | None


def point_of(row: Measurement) -> Point:
    """A measurement of a sweep."""
    found = (None, None) if row.out_of_memory else (seconds_per_token(row), row.memory["peak"])
    return Point(row.arm, row.value, *found)


def plot_sweep(points: list[Point], swept: str, path: Path) -> None:
    """Write a PNG: time a token and peak memory against the swept quantity, a line for each arm; a cross where memory ran out. UserError
    when the disk refuses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = list(dict.fromkeys(point.value for point in points))
    try:
        places = {value: float(value) for value in values}
    except ValueError:  # names stand side by side
        places = {value: float(number) for number, value in enumerate(values)}
    numbers = list(places.values())
    far = min(numbers) > 0 and max(numbers) / min(numbers) >= 4
    panels = (("time a token (microseconds)", lambda point: 1e6 * point.seconds), ("peak memory (GiB)", lambda point: point.peak / GIB))
    figure, all_axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, (label, measure) in zip(all_axes, panels):
        for arm in dict.fromkeys(point.arm for point in points):
            done = sorted((point for point in points if point.arm == arm and point.peak is not None), key=lambda point: places[point.value])
            line, = axes.plot([places[point.value] for point in done], [measure(point) for point in done], "o-", markersize=4, label=arm)
            failed = [point for point in points if point.arm == arm and point.peak is None]
            if failed:  # at the top of the picture
                axes.plot(
                    [places[point.value] for point in failed], [0.98] * len(failed), "x", color=line.get_color(),
                    transform=axes.get_xaxis_transform(), label=f"{arm}: out of memory",
                )
        if far:
            axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, values)
        axes.set(xlabel=swept, ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    all_axes[0].legend()
    write_figure(figure, path)
