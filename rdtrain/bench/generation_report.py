"""What generation costs, as people read it: tables of arms against K, and what the weights' reading alone would take."""

from ..tables import bytes_text, markdown_lines

HEADLINE = 32  # iterations at which the time of a single text is held against that of reading the weights


def page(report: dict) -> str:
    """The Markdown page of generation.json, complete or not."""
    facts, effort, rows = report["facts"], report["effort"], report["measurements"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("rdtrain", "torch") if facts["versions"].get(name))
    left = "" if report["complete"] else " Not complete: `--resume` measures what is left."
    lines = [
        "# What generation costs", "",
        f"    {facts['command']}", "",
        f"{facts['started'][:10]}, commit {facts['commit'] or 'unknown'}, {facts['machine']}, {versions}. Prompts of {effort['prompt']} "
        f"tokens, then up to {effort['new']} new ones; medians of {effort['repeats']} repeats. Memory moves "
        f"{report['bandwidth'] / 1e9:,.0f} GB/s, the best of sums and copies.{left}", "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += _model(model, [row for row in rows if row["model"] == model], report["bandwidth"])
    return "\n".join(lines)


def times_of_reading(row: dict, bandwidth: float) -> tuple[float, float] | None:
    """How many times as long a token takes as its weights need to be read: all of them once an iteration, and those that run alone.

    None where the case did not run, or its iterations ended early.
    """
    if row["token_seconds"] is None or row["iterations_used"]:
        return None
    passes = 1 if row["arm"].split()[0] == "plain" else row["iterations"]
    return row["token_seconds"] * bandwidth / (passes * row["weight_bytes"]), row["token_seconds"] * bandwidth / row["read_bytes"]


def _model(name: str, rows: list[dict], bandwidth: float) -> list[str]:
    sizes = {row["arm"].split()[0]: row["parameters"] for row in rows if not row["arm"].startswith("plain")}
    shapes = ", ".join(f"{arm} {count / 1e6:,.4g}M" for arm, count in sizes.items())
    lines = [f"## {name}", "", f"Parameters: {shapes}. Weights in {rows[0]['precision']}.", ""]
    lines += _headline(rows, bandwidth)
    lines += _table("Tokens a second, of all texts", rows, lambda row: f"{row['batch'] / row['token_seconds']:,.0f}")
    lines += _table("First token, ms", rows, lambda row: f"{1e3 * row['first_token_seconds']:.1f}")
    lines += _table("Key-value cache, of all texts", rows, lambda row: bytes_text(row["cache_bytes"]), ran=False)
    adaptive = [row for row in rows if row["iterations_used"]]
    if adaptive:
        lines += _table("Iterations that a token took, mean", adaptive, lambda row: f"{mean_iterations(row):.1f}")
    plain = [row for row in rows if row["arm"].startswith("plain")]
    if plain:
        lines += _table("Plain transformers of as many operations: layers, parameters", plain,
                        lambda row: f"{row['layers']}, {row['parameters'] / 1e6:,.4g}M", ran=False)
    looked = [row for row in rows if row["launches"]]
    if looked:
        cells = [
            [row["arm"], f"{row['iterations']}", f"{row['batch']}", f"{1e3 * row['token_seconds']:.2f}", f"{1e3 * row['busy_seconds']:.2f}",
             f"{row['launches']:,.0f}", _costliest(row)] for row in looked if row["busy_seconds"]
        ]
        header = ["what a token is", "K", "batch", "ms", "device busy, ms", "kernels", "costliest"]
        lines += [*markdown_lines(header, cells), ""]
    return lines


def mean_iterations(row: dict) -> float:
    """Iterations that a token took, of a row with an exit."""
    counts = {int(used): count for used, count in row["iterations_used"].items()}
    return sum(used * count for used, count in counts.items()) / sum(counts.values())


def _costliest(row: dict) -> str:
    return ", ".join(f"{kernel['name'][:50]} {1e3 * kernel['seconds']:.2f} ms in {kernel['calls']:,.0f}" for kernel in row["kernels"][:3])


def _headline(rows: list[dict], bandwidth: float) -> list[str]:
    header = ["at batch 1", "K", "ms a token", "times reading all weights once an iteration", "times reading those that run"]
    lines = []
    for row in rows:
        times = times_of_reading(row, bandwidth)
        if row["batch"] == 1 and times is not None and row["iterations"] == HEADLINE:
            lines.append([row["arm"], f"{row['iterations']}", f"{1e3 * row['token_seconds']:.2f}", f"{times[0]:.2f}", f"{times[1]:.2f}"])
    return [*markdown_lines(header, lines), ""] if lines else []


def _table(title: str, rows: list[dict], show, ran: bool = True) -> list[str]:
    """Rows of (arm, batch), columns of K. ran: whether only what was run can be shown."""
    iterations = sorted({row["iterations"] for row in rows})
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for batch in sorted({row["batch"] for row in rows if row["arm"] == arm}):
            cells = []
            for k in iterations:
                found = [row for row in rows if (row["arm"], row["batch"], row["iterations"]) == (arm, batch, k)]
                cells.append("" if not found else "out of memory" if ran and found[0]["out_of_memory"] else show(found[0]))
            lines.append([arm, f"{batch}", *cells])
    return [*markdown_lines([title, "batch", *(f"K = {k}" for k in iterations)], lines), ""]
