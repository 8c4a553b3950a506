"""A plan as people read it: what each arm computes, what it costs on so many GPUs, where memory goes, and what would have to change."""

from ..config import Config
from ..tables import bytes_text, columns
from .costing import Cluster, Cost

UNITS = ((86400, "days"), (3600, "hours"), (60, "min"), (1, "s"))
NAMES = {"gathered": "weights of a pass", "messages": "buffers", "optimizer_state": "optimizer"}


def report(costs: list[Cost], config: Config, vocab_size: int, filled: float, cluster: Cluster, price: float | None) -> str:
    """The tables and sentences. costs: of the arms in turn, for each number of GPUs; cluster: one of them, for what they share. filled: the
    share of a sequence's positions that train."""
    possible = [row for row in costs if row.refused is None]
    parts = [_heading(config, vocab_size, filled, cluster, price)]
    if possible:
        parts += [_arms(possible), _table(costs, price), _memory(possible)]
    return "\n\n".join([*parts, *_sentences(costs, cluster)])


def _heading(config: Config, vocab_size: int, filled: float, cluster: Cluster, price: float | None) -> str:
    gpu, engine = cluster.gpu, config.engine
    sharded = f"deepspeed, ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else engine.name
    padded = f", {filled:.1%} of them filled" if filled < 1 else ""
    lines = [
        f"{config.run.name}: sequences of {config.data.sequence_length:,} tokens{padded}, a vocabulary of {vocab_size:,}, engine {sharded}",
        f"{gpu.name}: {gpu.tflops:,.0f} TFLOP/s on paper, of which {cluster.mfu:.0%} is taken; {gpu.memory:g} GiB, of which "
        f"{gpu.memory - cluster.reserve:g} for tensors; it sends {gpu.link:,g} GB/s in a node of {gpu.per_node}, "
        f"{min(cluster.network, gpu.link):g} beyond" + (f"; {price:,.2f} an hour" if price else ""),
    ]
    return "\n".join(lines)


def _arms(possible: list[Cost]) -> str:
    lines = [["", "parameters", *possible[0].parameters, "FLOPs a token", "computed again", "FLOPs in all", "FLOPs x"]]
    seen = {row.arm: row for row in reversed(possible)}
    first = possible[0]
    for arm in dict.fromkeys(row.arm for row in possible):
        row = seen[arm]
        lines.append([
            arm, f"{sum(row.parameters.values()):,}", *(f"{count:,}" for count in row.parameters.values()), f"{row.flops_per_token:.3e}",
            f"{row.recomputed_per_token / row.flops_per_token:.0%}", f"{row.training_flops:.3e}",
            f"{row.flops_per_token / first.flops_per_token:.2f}",
        ])
    return columns(lines)


def _table(costs: list[Cost], price: float | None) -> str:
    header = ["GPUs, arm", "batch", "micro-batch", "GiB", "fits", "largest micro-batch", "sent a step", "s/step", "bound by", "tokens/s",
              "all steps", "GPU-hours", *(["cost"] if price else []), "time x"]
    lines, first = [header], None
    for row in costs:
        if first is None or row.gpus != first.gpus:
            first = row
        name = f"{row.gpus:,}, {row.arm}"
        if row.refused is not None:
            lines.append([name, "", "", "", "no"] + [""] * (len(header) - 5))
            continue
        hours = row.gpus * row.training_seconds / 3600
        tokens = row.training_flops / row.flops_per_token / row.training_seconds
        lines.append([
            name, f"{row.global_sequences:,}{'*' if row.grown else ''}", f"{row.accumulation} x {row.micro_sequences}",
            f"{row.peak / 2**30:,.1f}", "yes" if row.fits else "no", f"{row.largest_micro or '-'}", bytes_text(row.sent),
            f"{row.step_seconds:.3g}", "network" if row.sending_seconds >= row.step_seconds else "GPUs", f"{tokens:,.0f}",
            _duration(row.training_seconds), f"{hours:,.1f}", *([f"{price * hours:,.0f}"] if price else []),
            "" if first.refused is not None else f"{row.training_seconds / first.training_seconds:.2f}",
        ])
    note = "\n* the next larger batch that so many GPUs can share; the config's own cannot be" if any(row.grown for row in costs) else ""
    return columns(lines) + note


def _memory(possible: list[Cost]) -> str:
    kinds = [kind for kind in possible[0].memory.kinds if any(row.memory.kinds[kind] for row in possible)]
    lines = [["GiB of a GPU", *(_kind(kind) for kind in kinds), "peak"]]
    for row in possible:
        found = (row.memory.kinds[kind] / 2**30 for kind in kinds)
        lines.append([f"{row.gpus:,}, {row.arm}", *(f"{count:,.2f}" for count in found), f"{row.peak / 2**30:,.2f}"])
    return columns(lines) + (
        "\nGradients come as activations go, so the peak is less than the sum; activations, and what the loss takes, are estimates."
    )


def _duration(seconds: float) -> str:
    length, unit = next((each for each in UNITS if seconds >= each[0]), UNITS[-1])
    return f"{seconds / length:,.3g} {unit}"


def _kind(kind: str) -> str:
    host = kind.startswith("host_")
    name = kind.removeprefix("host_")
    return ("CPU: " if host else "") + NAMES.get(name, name.replace("_", " "))


def _sentences(costs: list[Cost], cluster: Cluster) -> list[str]:
    found = []
    for row in costs:
        who = f"{row.arm} on {row.gpus:,} x {cluster.gpu.name}"
        if row.refused is not None:
            found.append(f"{who} cannot run: {row.refused}.")
        elif not row.fits:
            missing = (row.peak - cluster.room) / 2**30
            change = f"the nearest that fits: {' '.join(row.change)}" if row.change else "nothing that is known makes it fit"
            found.append(f"{who} does not fit, by {missing:,.1f} GiB; {change}.")
    return ["\n".join(found)] if found else []
