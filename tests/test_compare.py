"""The report quotes the runs' own records, and its curves meet at equal FLOPs."""

import json

import pytest

from rdtrain.config import load_config
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
    for arm in (blocks, bptt):
        last = read_metrics(tmp_path / arm["name"] / "metrics.jsonl")[-1]
        assert arm["validation_nll"] == last["validation_nll"] and f"**{arm['validation_nll']:.4f}**" in text
        assert arm["training_flops"] == pytest.approx(arm["tokens"] * arm["training_flops_per_token"])
        assert len(arm["curve"]) == 3 and arm["curve"][-1] == [last["training_flops"], last["validation_nll"]]
    assert "| objective | diffusion_blocks | bptt truncated 2, Poisson depth 4 |" in text and "a sweep" in text
    ratio = bptt["training_flops_per_token"] / blocks["training_flops_per_token"]
    assert ratio > 1 and f"bptt costs {ratio:.2f} times the training FLOPs a token of blocks" in text
    # At the smaller budget the curve of that run has its end, and the other is interpolated between its evaluations.
    assert f"{blocks['validation_nll']:.4f} for blocks" in text
    assert (tmp_path / "report/nll-against-flops.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_refused(tmp_path, rdtrain, refused):
    refused(rdtrain("compare", tmp_path, "--output", tmp_path / "report"), "is not a run that has trained")
    assert not (tmp_path / "report").exists()
