"""Every engine and stage computes the losses of one plain PyTorch process: two processes, many cases in one launch."""

import pytest


@pytest.mark.parametrize(("length", "cases"), [("short", 21), pytest.param("full", 204, marks=pytest.mark.slow)])
def test_losses_weights_and_resumed_runs_are_those_of_one_plain_process(ranks, tmp_path, length, cases):
    """`full`: 50 steps of all engines x objectives x activation checkpointing x accumulation x precisions, half an hour on two cores."""
    timeout = 5400 if length == "full" else 900
    result = ranks(tmp_path, length, script="tests/distributed/engines_process.py", gpus=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len((tmp_path / "right.txt").read_text().splitlines()) == cases
