"""The report quotes the runs' own records, and says nothing of what lies between two evaluations."""

import json
from pathlib import Path
from statistics import mean

import pytest

from rdtrain.compare import plots, report
from rdtrain.compare.report import compare
from rdtrain.compare.runs import Arm
from rdtrain.config import load_config
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.train import train


def test_the_report_says_what_the_runs_recorded(tiny_config, tmp_path, rdtrain):
    arms = {"blocks": {"name": "diffusion_blocks"}, "bptt": {"name": "bptt", "trained_iterations": 2}}
    for name, objective in arms.items():
        source = {"learning_rate_source": "a sweep"} if name == "bptt" else {}
        assert train(load_config(tiny_config(name, objective=objective, optimizer=source))) == 0
    result = rdtrain("compare", tmp_path / "blocks", tmp_path / "bptt", "--output", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "report/report.md").read_text()
    assert result.stdout.strip() == text.strip()
    blocks, bptt = json.loads((tmp_path / "report/report.json").read_text())
    assert len(blocks["validation_hash"]) == 64 and blocks["validation_hash"] == bptt["validation_hash"]
    for arm in (blocks, bptt):
        last = read_metrics(tmp_path / arm["name"] / "metrics.jsonl")[-1]
        assert arm["validation_nll"] == last["validation_nll"] and f"**{arm['validation_nll']:.4f}**" in text
        assert arm["training_flops"] == pytest.approx(arm["tokens"] * arm["training_flops_per_token"])
        assert len(arm["curve"]) == 3 and arm["curve"][-1] == [last["training_flops"], last["seconds"], last["validation_nll"]]
    assert "| objective | diffusion_blocks | bptt truncated 2, Poisson depth 4 |" in text and "a sweep" in text
    for arm in (blocks, bptt):
        steps, parts = read_metrics(tmp_path / arm["name"] / "metrics.jsonl")[2:], arm["step_parts"]
        assert all(0 < step["forward_seconds"] < step["step_seconds"] for step in steps) and list(parts)[-1] == "the rest"
        assert parts["forward passes"] == pytest.approx(mean(step["forward_seconds"] for step in steps))
        assert sum(parts.values()) == pytest.approx(mean(step["step_seconds"] for step in steps))
        assert f"| {1000 * parts['the rest']:.1f} ({parts['the rest'] / sum(parts.values()):.0%}) |" in text
    ratio = bptt["training_flops_per_token"] / blocks["training_flops_per_token"]
    assert ratio > 1 and f"bptt costs {ratio:.2f} times the training FLOPs a token of blocks" in text
    within = [nll for flops, _, nll in bptt["curve"] if flops <= blocks["training_flops"]][-1]
    assert f"held-out NLL came to {blocks['validation_nll']:.4f} for blocks and {within:.4f} for bptt" in text
    page = (tmp_path / "report/report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 3 and ".png" not in page and "<td>a sweep</td>" in page
    for plot in ("nll-against-flops.png", "nll-against-time.png", "step-time.png"):
        assert (tmp_path / "report" / plot).read_bytes().startswith(b"\x89PNG") and plot in text


def test_runs_that_did_not_record_their_forward_passes_are_named_or_leave_the_section_out(tiny_config, tmp_path):
    for name, objective in (("old", "bptt"), ("new", "diffusion_blocks")):
        assert train(load_config(tiny_config(name, objective={"name": objective}))) == 0
    metrics = tmp_path / "old/metrics.jsonl"
    records = [{key: value for key, value in record.items() if key != "forward_seconds"} for record in read_metrics(metrics)]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = compare([tmp_path / "old", tmp_path / "new"], tmp_path / "both")
    assert "Not recorded by old." in text and (tmp_path / "both/step-time.png").exists()
    text = compare([tmp_path / "old"], tmp_path / "one")
    assert "Where the time of a step goes" not in text and not (tmp_path / "one/step-time.png").exists()


def arm(name: str, objective: str, *curve: tuple[float, float, float]) -> Arm:
    """A run with this curve, of which all else that is a number is 1."""
    texts = dict.fromkeys(("learning_rate_source", "tokenizer_hash", "validation_hash", "folder", "machine", "precision"), "")
    texts["settings"] = name.partition(", seed")[0]
    values = dict.fromkeys(Arm.__dataclass_fields__, 1.0) | texts | {"name": name, "objective": objective}
    return Arm(**values | {"step_parts": None, "curve": list(curve), "seconds": curve[-1][1], "validation_nll": curve[-1][2]})


@pytest.mark.parametrize("file, name", [("run.json", "machine"), ("metrics.jsonl", "peak_memory_bytes")])
def test_records_of_another_version_are_refused_by_what_they_lack(tiny_config, tmp_path, file, name):
    assert train(load_config(tiny_config())) == 0
    path = tmp_path / "run" / file
    path.write_text(path.read_text().replace(f'"{name}"', '"other"'))
    with pytest.raises(UserError, match=f"the records of .*run have no {name}: compare it with the version of rdtrain that wrote it"):
        compare([tmp_path / "run"], tmp_path / "report")


def test_the_time_to_another_runs_nll_is_that_of_an_evaluation(tmp_path, monkeypatch):
    slow = {f"slow, seed {seed}": arm(f"slow, seed {seed}", "truncated", (0, 0.0, 9.0), (2, end, nll))
            for seed, end, nll in ((1, 80.0, 4.3), (2, 100.0, 4.2))}
    arms = slow | {
        "ours": arm("ours", "diffusion_blocks", (0, 0.0, 9.0), (1, 10.0, 5.0), (2, 20.0, 4.0), (3, 30.0, 4.2)),
        "short": arm("short", "diffusion_blocks", (0, 0.0, 9.0), (0.5, 9.0, 4.25)),
        "full": arm("full", "full", (0, 0.0, 9.0), (2, 90.0, 3.5)),
    }
    monkeypatch.setattr(report, "read_arm", lambda folder: arms[str(folder)])
    text = compare([Path(name) for name in ("ours", "short", "full", *slow)], tmp_path)
    assert ("**short had 4.2500 after 9.0 s: 0.100 of the time and 0.500 of the training FLOPs to the 4.2500 that slow has after 90.0 s "
            "(2 seeds, 4.2000 to 4.3000).**") in text
    assert "**ours and short: never down to the 3.5000 that full has after 90.0 s.**" in text
    arms["full"].tokenizer_hash = "1" * 64
    with pytest.raises(UserError, match="full with 111111111111, .*: compare runs of one tokenizer"):
        compare([Path("ours"), Path("full")], tmp_path / "other")
    arms["ours"].validation_hash, arms["short"].validation_hash = "1" * 64, "2" * 64
    with pytest.raises(UserError, match="ours and short were evaluated on different validation shards, .*: compare runs of one"):
        compare([Path("ours"), Path("slow, seed 1"), Path("short")], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_names_say_what_they_say_in_tables_and_plots(tmp_path, monkeypatch):
    names = ["_K=32 | $2 and $3", r"$\foo$"]
    arms = {name: arm(name, name, (0, 0.0, 9.0), (1, 1.0, 8.0)) for name in names}
    monkeypatch.setattr(report, "read_arm", lambda folder: arms[str(folder)])
    drawn, save = [], plots.write_figure
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    compare([Path(name) for name in names], tmp_path)
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [f"{name} (learning rate 1)" for name in names]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<th>_K=32 | $2 and $3</th>") == 2


def test_a_folder_without_a_run_is_refused(tmp_path, rdtrain, refused):
    refused(rdtrain("compare", tmp_path, "--output", tmp_path / "report"), "is not a run that has trained")
    assert not (tmp_path / "report").exists()
