"""Every engine and stage computes the losses of one plain PyTorch process: two processes, many cases in one launch."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.parametrize("length", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_losses_weights_and_resumed_runs_are_those_of_one_plain_process(deepspeed, tmp_path, length):
    """`full`: 50 steps of all engines x objectives x activation checkpointing x accumulation x precisions, half an hour on two cores."""
    script = Path(__file__).with_name("engines_process.py")
    specification = importlib.util.spec_from_file_location("engines_process", script)
    process = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(process)
    result = deepspeed(tmp_path, length, script=str(script), timeout=5400 if length == "full" else 500)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    right = (tmp_path / "right.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in right] == process.cases(length)
