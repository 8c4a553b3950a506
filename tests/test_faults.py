"""Faults in one process: signals in each phase, steps that must not count, and settings that would be one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rdtrain import faults
from rdtrain.checkpoint import Checkpointer, read_state
from rdtrain.config import load_config
from rdtrain.engine.torch_engine import TorchEngine
from rdtrain.faults import FaultSettings
from rdtrain.metrics import read_metrics
from rdtrain.model.information import UNIT
from rdtrain.objectives import DiffusionBlocks, Loss
from rdtrain.train import train

TIMES = {"seconds", "step_seconds", "data_wait_seconds", "forward_seconds", "tokens_per_second", "peak_memory_bytes"}


def told(folder: Path) -> list[dict]:
    """The records of a run, without what differs from one time to the next."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture
def whole(tiny_config, tmp_path):
    """The records and last weights of a run that nobody disturbs."""
    assert train(load_config(tiny_config("whole"))) == 0
    return told(tmp_path / "whole"), load_file(tmp_path / "whole/checkpoints/step-00000008/model.safetensors")


def signal_in_call(monkeypatch, owner, name: str, number: int, call: int) -> list[int]:
    """Have this process signalled in the given call of a function; returns a list that holds a number for each call."""
    original, calls = getattr(owner, name), []

    def function(*arguments, **keywords):
        calls.append(len(calls) + 1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # the thread that watches has read it
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, function)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "call", "number", "code", "stopped_at", "calls"),
    [
        (TorchEngine, "held_out_nll", 5, signal.SIGUSR1, 75, 4, 6),  # four batches an evaluation: the first one after step 0
        (TorchEngine, "held_out_nll", 9, signal.SIGTERM, 143, 8, 10),  # the last evaluation of all, still owed by a finished run
        (Checkpointer, "save", 1, signal.SIGINT, 130, 4, 1),  # and no second checkpoint after that
        (TorchEngine, "train_step", 6, signal.SIGUSR1, 75, 7, 7),
    ],
)
def test_a_signal_in_any_phase_ends_in_a_checkpoint_from_which_nothing_shows(
    monkeypatch, whole, tiny_config, tmp_path, owner, name, call, number, code, stopped_at, calls
):
    config = load_config(tiny_config())
    with monkeypatch.context() as patched:
        counted = signal_in_call(patched, owner, name, number, call)
        assert train(config) == code
        assert len(counted) == calls
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert newest.name == f"step-{stopped_at:08d}"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
    assert train(config) == 0
    assert not read_state(newest.with_name("step-00000008"))["unfinished_record"]
    records, weights = whole
    assert told(tmp_path / "run") == records
    assert all(tensor.equal(weights[key]) for key, tensor in load_file(newest.with_name("step-00000008") / "model.safetensors").items())


SIGNALS = """
import os, signal, sys, time
from rdtrain import train as loop
from rdtrain.checkpoint import Checkpointer
from rdtrain.cli import main
from rdtrain.engine.torch_engine import TorchEngine
where, numbers = sys.argv.pop(1), [signal.SIGINT, signal.SIGINT] if sys.argv[1] == "twice" else [int(sys.argv[1])]
del sys.argv[1]
def stuck(*arguments, **keywords):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(2.5)
    time.sleep(600)
owner = {"build_engine": loop, "load": Checkpointer, "train_step": TorchEngine}[where]
setattr(owner, where, stuck)
main()
"""


@pytest.mark.parametrize(
    ("where", "number", "code", "sentence"),
    [
        ("build_engine", signal.SIGTERM, 143, "stopped during start, with nothing new to save"),
        ("load", signal.SIGUSR1, 75, "stopped during loading the checkpoint, with nothing new to save"),
        ("train_step", "twice", 130, "stopped at once by a second interrupt"),
    ],
)
def test_a_signal_with_nothing_to_save_and_a_second_interrupt_end_at_once(tiny_config, tmp_path, where, number, code, sentence):
    """Though the main thread is stuck and would never look."""
    path = tiny_config()
    if where == "load":
        assert train(load_config(path)) == 0
        (tmp_path / "run/checkpoints/step-00000008").rename(tmp_path / "away")
    before = sorted(tmp_path.glob("run/checkpoints/*"))
    command = [sys.executable, "-c", SIGNALS, where, str(getattr(number, "value", number)), "train", "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stderr
    assert sentence in result.stderr and "start the same command again to continue" in result.stderr and "Traceback" not in result.stderr
    assert sorted(tmp_path.glob("run/checkpoints/*")) == before


def test_a_skipped_step_teaches_nothing_and_levels_go_on_from_a_checkpoint(monkeypatch, tiny_config, tmp_path):
    """A loss that is not a number in step 3, and in step 7 one far beyond the level, which two runs learn: one of them in two parts."""
    plain = DiffusionBlocks.__call__

    def loss(objective, model, tokens, random):
        value = plain(objective, model, tokens, random)
        return Loss(value.value * {2: float("nan"), 6: 100.0}.get(random.indices[0] // 8, 1.0), value.metrics)

    monkeypatch.setattr(DiffusionBlocks, "__call__", loss)
    monkeypatch.setattr(faults, "SETTLED", 3)
    monkeypatch.setattr(faults, "RATE", 1 / 3)
    for run, code in (("whole", 0), ("parts", 143)):
        config = load_config(tiny_config(run, evaluation={"interval": 8}, checkpoint={"interval": 8}))
        with monkeypatch.context() as patched:
            if code:
                signal_in_call(patched, TorchEngine, "train_step", signal.SIGTERM, 4)
            assert train(config) == code
    state = read_state(tmp_path / "parts/checkpoints/step-00000005")
    assert sum(state["objective_state"]["pending"][1]) * UNIT == 4 * 8 * 16  # of five steps, sequences and tokens
    assert state["judge"]["seen"] == [4] and state["judge"]["skipped"] == 1
    losses = [record["loss"] for record in read_metrics(tmp_path / "parts/metrics.jsonl")[1:]]
    assert state["judge"]["levels"][0][0] == pytest.approx((losses[0] + losses[1] + losses[3]) / 3 * 2 / 3 + losses[4] / 3, rel=1e-6)
    assert train(load_config(tmp_path / "parts.yaml")) == 0
    records = [{**record, "run": None} for record in told(tmp_path / "parts")]
    assert [record["skipped_steps"] for record in records[1:]] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [record["step"] for record in records if record.get("loss", 0) is None] == [3, 7]
    assert records == [{**record, "run": None} for record in told(tmp_path / "whole")]
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize("wrong", [{"gradient_spike": 1.0}, {"loss_spike": -3.0}, {"stop_after_skipped": 0}, {"hang_seconds": -1.0}])
def test_settings_that_would_stop_healthy_runs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FaultSettings(**wrong)
