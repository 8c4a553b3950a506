"""The plots of a comparison, as PNG files."""

from pathlib import Path

from ..data.output import write_figure
from .runs import Arm


def plot_nll(arms: list[Arm], column: int, label: str, path: Path) -> None:
    """Held-out NLL against a column of the arms' curves. UserError where the disk refuses."""
    figure, axes = _figure(4.5)
    lines = [
        axes.plot([point[column] for point in arm.curve], [point[-1] for point in arm.curve], marker="o", markersize=3)[0] for arm in arms
    ]
    axes.set(xlabel=label, ylabel="held-out NLL (nats per token)", title=f"Held-out NLL against {label}")
    axes.grid(alpha=0.3)
    axes.legend(lines, [f"{arm.name} (learning rate {arm.learning_rate:g})" for arm in arms])
    write_figure(figure, path)


def plot_parts(arms: dict[str, dict[str, float]], label: str, title: str, path: Path, add_up: bool) -> None:
    """A bar for each arm, of what its parts have, in the unit that label names. add_up: the parts are shares of one whole, and are put end
    to end; else they lie below each other. UserError where the disk refuses."""
    parts = list(next(iter(arms.values())))
    figure, axes = _figure(1.5 + 0.45 * len(arms) * (1 if add_up else 1.8))
    thickness = 0.7 if add_up else 0.8 / len(parts)
    ends = [0.0] * len(arms)
    for number, part in enumerate(parts):
        values = [of_arm[part] for of_arm in arms.values()]
        rows = [row + (0 if add_up else (number - (len(parts) - 1) / 2) * thickness) for row in range(len(arms))]
        axes.barh(rows, values, thickness, left=ends, label=part)
        if add_up:
            ends = [end + value for end, value in zip(ends, values)]
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
    write_figure(figure, path)


def _figure(height: float):
    """A figure of seven inches by `height`, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # dollars in the name of a run are no formula
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, height), layout="constrained")
