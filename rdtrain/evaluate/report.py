"""The report of `rdtrain evaluate`: tables as Markdown, and plots. It takes the tree that report.json holds.

Notable: text is never shown by one number. A lower teacher NLL with a lower entropy is only a lower temperature, so the two stand
side by side, each with the human text's.
"""

import math
from collections.abc import Callable
from pathlib import Path

from ..tables import markdown_lines

SIGMA_PLOT, FRONTIER_PLOT, ITERATIONS_PLOT = "cross-entropy-against-sigma.png", "frontier.png", "quality-against-iterations.png"


def write_report(report: dict) -> str:
    """report.md."""
    settings = report["settings"]
    text = ["# Evaluation", "", f"{report['started']}, {report['machine']}, torch {report['versions']['torch']}: `{report['command']}`", ""]
    if report["likelihood"]:
        text += _likelihood(report["likelihood"], settings)
    if report["texts"]:
        text += _texts(report, settings)
    return "\n".join(text)


def _likelihood(models: list[dict], settings: dict) -> list[str]:
    rows = [
        [
            model["model"],
            "denoising, one iteration from pure noise" if model["denoising"] else f"unrolled, K = {model['iterations']}",
            f"{model['parameters']:,}",
            f"{model['trained_tokens']:,}",
            f"**{_number(model['held_out']['nll'])}**{_error(model['held_out']['standard_error'])}",
            _number(model["held_out"]["bits_per_byte"]),
            model["dtype"],
        ]
        for model in models
    ]
    header = ["model", "distribution", "parameters", "trained tokens", "NLL (nats/token)", "bits per byte", "dtype"]
    text = ["## Held-out likelihood", "", *markdown_lines(header, rows), ""]
    text += [f"{settings['shards']}: at most {settings['sequences']} sequences of {settings['sequence_length']} tokens.", ""]
    kinds = (
        (False, "NLL against K, unrolled models", ""),
        (True, "Bound on the NLL of K ancestral iterations, denoising models", "K iterations earn their cost in likelihood where "
         "this lies below K = 1, which is the held-out NLL."),
    )
    for denoising, title, note in kinds:
        chosen = [model for model in models if model["denoising"] == denoising]
        if chosen:
            curves = [{point["iterations"]: point["nll"] for point in model["by_iterations"]} for model in chosen]
            rows = [[str(k), *(_number(curve.get(k)) for curve in curves)] for k in sorted(set().union(*curves))]
            text += [f"### {title}", "", *markdown_lines(["K", *(model["model"] for model in chosen)], rows), ""] + [note, ""] * bool(note)
    denoising = [model for model in models if model["denoising"]]
    if denoising:
        text += ["### Cross-entropy against the noise level, denoising models", ""]
        text += ["A diagnostic of one iteration on noised targets, not a likelihood: at low sigma the state gives the token away.", ""]
        text += [f"![cross-entropy against sigma]({SIGMA_PLOT})", ""]
        for model in denoising:
            rows = [[f"{point['sigma']:.4g}", _number(point["cross_entropy"])] for point in model["cross_entropy_by_sigma"]]
            text += [*markdown_lines(["sigma", f"{model['model']} (nats/token)"], rows), ""]
    return text


def _texts(report: dict, settings: dict) -> list[str]:
    texts = report["texts"]
    first = texts[0]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("model", lambda one: one["model"]),
        ("K", lambda one: str(one["setting"]["iterations"])),
        ("temperature", lambda one: f"{one['setting']['temperature']:g}"),
        *((name, lambda one, name=name: str(one["setting"].get(name, "-"))) for name in _varying(texts)),
    ]
    if any("iterations_used" in one for one in texts):
        columns += [("mean iterations", lambda one: f"{one['iterations_used']['mean']:.2f}" if "iterations_used" in one else "-")]
    if report["teacher"]:
        columns += [
            ("teacher NLL (nats/token)", lambda one: _number(one["teacher"]["nll"]) + _error(one["teacher"]["standard_error"])),
            ("human's", lambda one: _number(one["human_teacher"]["nll"]) + _error(one["human_teacher"]["standard_error"])),
            ("teacher perplexity", lambda one: _perplexity(one["teacher"]["nll"])),
            ("human's", lambda one: _perplexity(one["human_teacher"]["nll"])),
            ("nats per byte", lambda one: _number(one["teacher"]["nll_per_byte"])),
            ("human's", lambda one: _number(one["human_teacher"]["nll_per_byte"])),
        ]
    columns += [
        ("unigram entropy (nats)", lambda one: _number(one["diversity"]["unigram_entropy"])),
        ("human's", lambda one: _number(one["human_diversity"]["unigram_entropy"])),
        ("distinct-1/2/3", lambda one: _distinct(one["diversity"])),
        ("human's", lambda one: _distinct(one["human_diversity"])),
    ]
    if report["mauve_features"]:
        columns += [
            (f"MAUVE, c = {scaling:g}", lambda one, place=place: _mauve(one["mauve"], place))
            for place, scaling in enumerate(settings["mauve"]["scalings"])
        ]
    columns += [("ended", lambda one: f"{100 * one['ended']:.1f}%")]
    text = ["## Text", "", *markdown_lines([name for name, _ in columns], [[value(one) for _, value in columns] for one in texts]), ""]
    shown = ("iterations", "temperature", *_varying(texts))
    others = {name: value for name, value in first["setting"].items() if name not in shown}
    text += [
        " or ".join(dict.fromkeys(f"{one['prompts']} prompts, {one['continuations']} continuations in all" for one in texts)) + "; "
        + ", ".join(f"{name} {value}" for name, value in others.items())
        + ". Entropy and distinct n-grams are of one continuation a prompt, averaged over the sets, and the human text's are on as many "
        "tokens. `ended`: continuations in which the model ended the document; what follows is not counted.",
        "",
    ]
    if report["teacher"]:
        text += [f"Teacher: {report['teacher']}; errors are standard errors over prompts.", ""]
    if report["mauve_features"]:
        text += [
            f"MAUVE: features of {report['mauve_features']}, scaling factors c, {first['mauve']['clusters']} clusters; the error is the "
            "standard deviation over sets of continuations.",
            "",
        ]
    if report["teacher"]:
        text += [f"![teacher NLL against unigram entropy]({FRONTIER_PLOT})", ""]
    if report["teacher"] or report["mauve_features"]:
        text += [f"![quality against K]({ITERATIONS_PLOT})", ""]
    text += ["A lower teacher NLL with a lower entropy is only a lower temperature: read the two together, and beside the human text.", ""]
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _error(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"


def _perplexity(nll: float | None) -> str:
    return "-" if nll is None else f"{math.exp(nll):.2f}"


def _distinct(diversity: dict) -> str:
    return " / ".join(f"{share:.3f}" for share in diversity["distinct"])


def _mauve(score: dict, place: int) -> str:
    return f"{score['mauve'][place]:.4f}{_error(score['standard_deviation'][place])}"


def write_plots(report: dict, output: Path) -> None:
    """The plots for which there are numbers, as PNG."""
    denoising = [model for model in report["likelihood"] if model["denoising"]]
    if denoising:
        _save(output / SIGMA_PLOT, 1, lambda axes: _plot_sigma(denoising, axes[0]))
    texts = report["texts"]
    if texts and report["teacher"]:
        _save(output / FRONTIER_PLOT, 1, lambda axes: _plot_frontier(texts, axes[0]))
    if texts and (report["teacher"] or report["mauve_features"]):
        judges = [("teacher NLL (nats per token)", "teacher", lambda score: score["nll"])]
        judges += [
            (f"MAUVE, c = {scaling:g}", "mauve", lambda score, place=place: score["mauve"][place])
            for place, scaling in enumerate(report["settings"]["mauve"]["scalings"])
        ]
        judges = [judge for judge in judges if judge[1] in texts[0]]
        _save(output / ITERATIONS_PLOT, len(judges), lambda axes: _plot_iterations(texts, judges, axes))


def _save(path: Path, panels: int, draw: Callable) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(7 if panels == 1 else 6 * panels, 4.5), layout="constrained", squeeze=False)
    draw(axes[0])
    for one in axes[0]:
        one.grid(alpha=0.3)
        one.legend(fontsize="small")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
    temporary.replace(path)


def _plot_sigma(models: list[dict], axes) -> None:
    for model in models:
        curve = model["cross_entropy_by_sigma"]
        points = [point["sigma"] for point in curve], [point["cross_entropy"] for point in curve]
        line = axes.plot(*points, marker="o", markersize=3, label=model["model"])[0]
        axes.axhline(model["held_out"]["nll"], color=line.get_color(), linestyle=":", label=f"{model['model']}: held-out NLL")
    axes.set(xscale="log", xlabel="noise level sigma", ylabel="cross-entropy (nats per token)", title="One iteration on noised targets")


def _plot_frontier(texts: list[dict], axes) -> None:
    for label, group in _lines(texts).items():
        points = [one["diversity"]["unigram_entropy"] for one in group], [one["teacher"]["nll"] for one in group]
        axes.plot(*points, marker="o", markersize=4, label=label)
        for one, entropy, nll in zip(group, *points):
            if nll is not None:
                axes.annotate(f"K {one['setting']['iterations']}", (entropy, nll), fontsize=7, xytext=(3, 3), textcoords="offset points")
    human = texts[0]
    axes.plot(human["human_diversity"]["unigram_entropy"], human["human_teacher"]["nll"], "k*", markersize=12, label="human text")
    axes.set(xlabel="unigram entropy (nats)", ylabel="teacher NLL (nats per token)", title="Likelihood by a teacher against variety")


def _plot_iterations(texts: list[dict], judges: list[tuple[str, str, Callable[[dict], float]]], axes) -> None:
    for one, (title, judge, value) in zip(axes, judges):
        for label, group in _lines(texts).items():
            one.plot([text["setting"]["iterations"] for text in group], [value(text[judge]) for text in group], marker="o", label=label)
        if judge == "teacher":
            one.axhline(texts[0]["human_teacher"]["nll"], color="black", linestyle=":", label="human text")
        counts = sorted({text["setting"]["iterations"] for text in texts})
        one.set(xscale="log", xlabel="iterations K", ylabel=title, title="Quality against K")
        one.set_xticks(counts, map(str, counts))
        one.minorticks_off()
        one.ticklabel_format(axis="y", useOffset=False)


def _lines(texts: list[dict]) -> dict[str, list[dict]]:
    """Settings that differ in K alone, by a label of all else that differs."""
    lines: dict[str, list[dict]] = {}
    for text in texts:
        setting = text["setting"]
        names = ("temperature", *_varying(texts))
        label = ", ".join([text["model"], *(f"{name} {setting[name]}" for name in names if name in setting)])
        lines.setdefault(label, []).append(text)
    return lines


def _varying(texts: list[dict]) -> list[str]:
    """The settings of sampling, but for iterations and temperature, that are not the same of all texts."""
    names = dict.fromkeys(name for text in texts for name in text["setting"] if name not in ("iterations", "temperature"))
    return [name for name in names if len({text["setting"].get(name) for text in texts}) > 1]
