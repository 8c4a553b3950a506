"""Weights and optimizer state in one portable form: engines agree on it, and a run goes on from it on any engine and number of ranks."""

import shutil

import pytest

from rdtrain.config import load_config
from rdtrain.metrics import read_metrics
from rdtrain.train import train


@pytest.mark.parametrize(
    ("processes", "length", "cases"),
    [(2, "short", 8), *(pytest.param(number, "full", 14, marks=pytest.mark.slow) for number in (1, 2, 4))],
)
def test_every_engine_gives_and_takes_the_same_snapshot(ranks, tmp_path, processes, length, cases):
    result = ranks(tmp_path, length, script="tests/distributed/snapshots_process.py", gpus=True, number=processes, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len((tmp_path / "right.txt").read_text().splitlines()) == cases


ZERO = {f"zero-{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)}
ENGINES = ZERO | {"fsdp": ["engine.name=fsdp"], "torch": ["engine.name=torch"]}


@pytest.mark.parametrize(
    ("precision", "legs", "steps"),
    [
        ("fp32", [("zero-3", 2), ("torch", 1)], 5),
        pytest.param("fp32", [("zero-1", 2), ("zero-3", 4), ("torch", 1)], 10, marks=pytest.mark.slow),
        pytest.param("fp32", [("zero-1", 2), ("zero-1", 4), ("zero-1", 1)], 10, marks=pytest.mark.slow),
        pytest.param("fp32", [("fsdp", 2), ("fsdp", 4), ("fsdp", 1)], 10, marks=pytest.mark.slow),
        pytest.param("fp32", [("zero-1", 2), ("zero-3", 2), ("fsdp", 2), ("torch", 1)], 10, marks=pytest.mark.slow),
        pytest.param("fp32", [("torch", 1), ("fsdp", 4), ("zero-2", 2), ("zero-0", 4)], 10, marks=pytest.mark.slow),
        pytest.param("bf16", [("zero-1", 2), ("zero-3", 4), ("fsdp", 2), ("torch", 1)], 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_on_other_engines_and_ranks_as_if_it_had_never_stopped(tiny_config, tmp_path, ranks, precision, legs, steps):
    """Each leg trains to the end, twice so many steps at the least, and the next one goes on from so many steps after that
    leg's start, with other micro-batches too. Blocks are untied, so that each has its own step count, and the information curve is
    learned meanwhile: from step 16 on, which each leg passes. Other samples or noise would show in the loss at once.
    """
    settings = {
        "model": {"blocks": 2}, "noise": {"partition": "equal_information"}, "schedule": {"steps": steps * (len(legs) + 1)},
        "optimizer": {"learning_rate": 0.003}, "checkpoint": {"interval": steps, "keep": 9}, "evaluation": {"interval": 80},
    }
    assert train(load_config(tiny_config("whole", **settings))) == 0
    right = losses(tmp_path / "whole")
    path = tiny_config(**settings, engine={"precision": precision})
    for leg, (engine, number) in enumerate(legs):
        overrides = [*ENGINES[engine], f"batch.micro_sequences={1 + leg % 2}"]
        if engine == "torch":
            assert train(load_config(path, overrides)) == 0
        else:
            result = ranks("--config", path, *overrides, number=number)
            assert result.returncode == 0, result.stderr[-4000:]
            assert leg == 0 or f"continuing from step {steps * leg}" in result.stdout
        found = losses(tmp_path / "run")
        assert len(found) == len(right)
        assert found == pytest.approx(right, abs=1e-4 if precision == "fp32" else 0.02)
        for step in range(steps * (leg + 2), len(right) + 1, steps):
            shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["step"]]
