"""launch/quickstart.sh itself, on a little text, with a smaller model and budget: interrupted and started again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rdtrain.metrics import read_metrics

PROJECT = Path(__file__).parent.parent


@pytest.mark.parametrize("starts", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_quickstart_continues_after_an_interrupt_and_ends_with_text(text_folder, tmp_path, starts):
    """With a third start, in a slow test, of which nothing is left to be done; that a run's second one then does nothing, test_train.py
    has in every run."""
    output = tmp_path / "quick"
    command = ["bash", "launch/quickstart.sh", "--output", str(output), "--text", str(text_folder), "--"]
    command += ["model.core_layers=1", "model.iterations=12", "data.sequence_length=64"]  # starts are what there is to test
    command += ["model.width=64", "model.mlp_width=192", "schedule.training_flops=6e10"]
    command += ["evaluation.interval=5", "evaluation.sequences=4", "logging.interval=1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=PROJECT, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Tests that a shell has started in the background ignore SIGINT, and a shell below them could not trap it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    process = start()
    metrics = output / "blocks/metrics.jsonl"
    deadline = time.monotonic() + 600
    try:
        while not metrics.exists() or len(read_metrics(metrics)) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal
        out, err = process.communicate(timeout=600)
        assert process.returncode == 130 and "start the same command again to continue" in out, err
        reached = len(read_metrics(metrics))

        process = start()
        out, err = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert "continuing from step" in out and "== generate\nReturns the" in out and "Try next" in out
    records = read_metrics(metrics)
    assert [record["step"] for record in records] == list(range(len(records))) and len(records) > reached
    blocks, bptt = json.loads((output / "report.json").read_text())
    assert abs(bptt["training_flops"] / blocks["training_flops"] - 1) < 0.5  # whole steps of a small budget
    assert (output / "model/model.safetensors").exists() and (output / "nll-against-flops.png").exists()

    if starts == 2:
        return
    before = metrics.read_bytes()
    process = start()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.count("nothing to do") == 2, err
    assert metrics.read_bytes() == before


def test_other_text_in_the_same_folder_and_unknown_arguments_are_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "text").write_text("one.txt\n")

    def run(*arguments):
        return subprocess.run(["bash", "launch/quickstart.sh", *arguments], cwd=PROJECT, capture_output=True, text=True)

    result = run("--output", str(tmp_path), "--text", "two.txt")
    assert result.returncode == 2 and "was made from other text (one.txt)" in result.stderr
    result = run("--nonsense")
    assert result.returncode == 2 and "unknown argument '--nonsense'" in result.stderr
    assert "--text book.txt" in run("--help").stdout
