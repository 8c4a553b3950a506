"""`rdtrain evaluate` as a user types it: its numbers are those of training's own evaluation, and a bad request is refused at once."""

import json
import shutil
import subprocess
import sys

import pytest

from rdtrain.cli import main
from rdtrain.data.shards import seal_manifest
from rdtrain.errors import UserError
from rdtrain.evaluate.command import EvaluateSettings, evaluate
from rdtrain.metrics import read_metrics

SMALL = ("--sequences", 8, "--sequence-length", 16, "--prompts", 4, "--prompt-tokens", 6, "--new-tokens", 5, "--continuations", 2,
         "--iterations", 1, 3, "--nll-iterations", 1, 4, "--sigma-levels", 5)


def test_two_runs_are_measured_and_their_samples_scored_again_elsewhere(rdtrain, run, shards, gpt2, tmp_path):
    pytest.importorskip("mauve")
    runs = [run("blocks"), run("bptt", objective={"name": "bptt", "depth": "fixed", "trained_iterations": 3})]
    assert rdtrain("export", runs[1], "--output", tmp_path / "exported").returncode == 0
    output = tmp_path / "report"
    judges = ("--teacher", gpt2, "--mauve-features", runs[1])
    result = rdtrain(
        "evaluate", runs[0], tmp_path / "exported", "--shards", shards / "validation", "--output", output, *SMALL, *judges,
        "--exit", "entropy", "--exit-threshold", 9,  # more than ln V: only the prompt's pass runs all iterations
    )
    assert result.returncode == 0, result.stderr
    report, text = json.loads((output / "report.json").read_text()), (output / "report.md").read_text()
    assert result.stdout.strip() == text.strip()
    blocks, bptt = report["likelihood"]
    for model, folder in zip((blocks, bptt), runs):
        last = read_metrics(folder / "metrics.jsonl")[-1]
        assert model["held_out"]["nll"] == pytest.approx(last["validation_nll"], rel=1e-5)
        assert model["held_out"]["bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-5)
        assert f"**{model['held_out']['nll']:.4f}**" in text
    # One iteration of the chain is the likelihood again, with other noise and what it costs to call y + sigma_max eps pure noise.
    assert [point["iterations"] for point in blocks["by_iterations"]] == [1, 4]
    assert blocks["by_iterations"][0]["nll"] == pytest.approx(blocks["held_out"]["nll"], rel=0.02)
    assert f"{blocks['by_iterations'][1]['nll']:.4f}" in text
    curve = blocks["cross_entropy_by_sigma"]
    assert [point["sigma"] for point in curve] == pytest.approx([80 * (0.002 / 80) ** (place / 4) for place in range(5)])
    # At sigma_max the target is lost in the noise, so this is the likelihood again, with other noise.
    assert curve[0]["cross_entropy"] == pytest.approx(blocks["held_out"]["nll"], rel=0.02)
    assert curve[-1]["cross_entropy"] < curve[0]["cross_entropy"]
    assert bptt["by_iterations"][1]["nll"] == pytest.approx(bptt["held_out"]["nll"])
    settings = [(one["model"], one["setting"]["iterations"], one["setting"]["temperature"]) for one in report["texts"]]
    assert settings == [(name, k, t) for name in ("blocks step 4", "exported") for k in (1, 3) for t in (1.0, 0.8)]
    for name in ("cross-entropy-against-sigma", "frontier", "quality-against-iterations"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for one in report["texts"]:
        used, k = one["iterations_used"], one["setting"]["iterations"]
        counts = {int(count): tokens for count, tokens in used["histogram"].items()}
        assert used["mean"] == pytest.approx(sum(count * tokens for count, tokens in counts.items()) / sum(counts.values()))
        assert counts.keys() == {1, k} and (k == 1 or counts[k] == 8) and f"| {used['mean']:.2f} |" in text
        assert one["cache_bytes_per_text"] == 2 * 11 * 32 * 4 * (1 + 2 * k + (k if one["model"] == "blocks step 4" else 1))
    files = [output / one["file"] for one in report["texts"]]
    assert all(len(file.read_text().splitlines()) == 8 for file in files)
    again = rdtrain("evaluate", "--samples", *files, "--output", tmp_path / "again", *judges)
    assert again.returncode == 0, again.stderr
    for first, second in zip(report["texts"], json.loads((tmp_path / "again/report.json").read_text())["texts"]):
        for key, value in second.items():
            assert first[key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_bad_requests_are_refused_before_any_work(refused, run, shards, tmp_path, monkeypatch, capfd):
    folder, output = run("run"), tmp_path / "report"
    held_out = ("--shards", shards / "validation", "--output", output)

    def command(*arguments):  # the command in this process, as each new one would take seconds to import torch
        monkeypatch.setattr("sys.argv", ["rdtrain", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return subprocess.CompletedProcess([], left.value.code, *capfd.readouterr())

    refused(command("--output", output), "name model folders, or give --samples")
    refused(command(folder, "--output", output), "--shards")
    refused(command(tmp_path, *held_out), "is no model of rdtrain")
    refused(command(folder, folder, *held_out), "same name")
    refused(command(folder, *held_out, "--prompts", 0), "--prompts must be at least 1")
    refused(command(folder, *held_out, "--temperatures", -1), "temperature")
    refused(command(folder, *held_out, "--prompts", 100000, "--prompt-tokens", 5), "lower --prompts")
    fitting = ("--prompts", 4, "--prompt-tokens", 5)
    refused(command(folder, *held_out, *fitting, "--chain-readout", "core"), "trained with objective.core_readout=true: leave it at coda")
    refused(command(folder, "--shards", shards / "validation", "--output", "/proc", *fitting), "cannot be written to /proc")
    refused(command(folder, *held_out, "--teacher", tmp_path / "nothing"), "is no folder")
    refused(command("--samples", tmp_path / "nothing.jsonl", "--output", output), "cannot be read")
    other = shutil.copytree(shards / "validation", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    seal_manifest(other / "manifest.json", manifest | {"tokenizer_hash": "1" * 64})
    refused(command(folder, "--shards", other, "--output", output), "was written with tokenizer 111111111111")
    assert not output.exists()
    output.mkdir()
    (output / "report.json").write_text("{}")
    refused(command(folder, *held_out, *fitting), "holds a report already")


def test_a_disk_that_is_full_at_the_end_leaves_the_numbers(run, shards, tmp_path, monkeypatch):
    def full(report, output):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rdtrain.evaluate.command.write_plots", full)
    few = dict(skip=["samples"], sequences=1, sequence_length=8, sigma_levels=2, nll_iterations=[1])
    with pytest.raises(UserError, match=r"plots cannot be written to .*\(No space left.* report.json there has the numbers"):
        evaluate(EvaluateSettings([run("run")], tmp_path / "report", shards=str(shards / "validation"), **few))
    assert json.loads((tmp_path / "report/report.json").read_text())["likelihood"][0]["held_out"]["nll"] > 0


def test_a_missing_mauve_package_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UserError, match=r"pip install rdtrain\[mauve\]"):
        evaluate(EvaluateSettings([tmp_path], tmp_path / "report", shards=tmp_path, mauve_features=tmp_path))
