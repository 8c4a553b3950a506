"""Faults in real processes, through the launchers: what the user sees, the exit code, and that the next start goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rdtrain.metrics import read_metrics
from rdtrain.scaling.processes import free_port

FAULTY = "tests/distributed/faulty_train.py"


@pytest.fixture(params=["ranks", pytest.param("deepspeed", marks=pytest.mark.slow)])
def started(request):
    """Run a script as two ranks; in a slow test by the `deepspeed` command, whose own part others of this file have in every run."""
    return request.getfixturevalue(request.param)


def test_every_engine_leaves_bad_steps_out(ranks, tmp_path):
    result = ranks(tmp_path, script="tests/distributed/skips_process.py", gpus=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len((tmp_path / "right.txt").read_text().splitlines()) == 15


def test_steps_that_stay_bad_stop_the_run_with_their_batches_written_down(started, ranks, tiny_config, tmp_path, refused):
    """Rank 1's losses alone are not numbers, from step 6 on; the checkpoint of step 6 has no new weights and is not written."""
    path = tiny_config(engine={"name": "deepspeed"}, checkpoint={"interval": 3}, faults={"stop_after_skipped": 3}, schedule={"steps": 40})
    result = started("fault=nan-from:6", "--config", path, script=FAULTY)
    refused(result, "3 steps in a row were skipped, the last of them step 8 with loss nan", "skipped_steps.json")
    assert "step 6 skipped: loss nan" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000003"]
    written = json.loads((tmp_path / "run/skipped_steps.json").read_text())
    assert written["seed"] == 7 and [step["step"] for step in written["steps"]] == [6, 7, 8]
    first = written["steps"][0]["ranks"]
    assert [rank["samples"] for rank in first] == [[[40, 41], [44, 45]], [[42, 43], [46, 47]]]
    assert first[0]["loss"] > 0 and first[1]["loss"] != first[1]["loss"]
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["skipped_steps"] for record in records[1:]] == [0, 0, 0, 0, 0, 1, 2]
    assert records[5]["loss"] > 0 and records[6]["loss"] is None and records[6]["gradient_norm"] is None

    result = ranks("--config", path, "schedule.steps=40", "faults.stop_after_skipped=5")  # without the fault
    assert result.returncode == 0 and "continuing from step 3" in result.stdout, result.stderr
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["skipped_steps"] == 0


def test_ranks_that_are_about_to_do_different_things_stop(ranks, tiny_config, refused):
    result = ranks("fault=other-rate:3", "--config", tiny_config(engine={"name": "fsdp"}), script=FAULTY)
    refused(result, "the ranks do not agree on step 3", "same command, code and data")


def test_a_store_that_one_rank_cannot_read_stops_all_and_the_next_start_continues(ranks, tiny_config, tmp_path):
    path = tiny_config(engine={"name": "deepspeed"}, checkpoint={"interval": 3, "asynchronous": False})
    result = ranks("fault=read:5", "--config", path, script=FAULTY)
    assert result.returncode > 0 and "Traceback" not in result.stderr, result.stderr
    assert "cannot be read ([Errno 5] Input/output error), though every file is as it was written; mend the disk" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000003"]
    result = ranks("--config", path)
    assert result.returncode == 0 and "continuing from step 3" in result.stdout, result.stderr


def test_a_rank_that_hangs_ends_the_run_with_every_stack_written_down(started, tiny_config, tmp_path):
    config = tiny_config(engine={"name": "deepspeed"}, faults={"hang_seconds": 8})
    result = started("fault=hang:3", "--config", config, script=FAULTY, timeout=600)
    assert result.returncode == 124, result.stderr
    assert "rank 1 has been in step 3 for" in result.stderr and "start the same command again to continue" in result.stderr
    stacks = [(tmp_path / f"run/stacks-rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "all_reduce" in stacks[0] and "time.sleep" not in stacks[0]  # waits for the other
    assert 'faulty_train.py", line' in stacks[1] and "s in step 3" in stacks[1]


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_launcher_and_the_next_start_continues(tiny_config, tmp_path, ranks, launcher):
    path = tiny_config(engine={"name": "deepspeed"}, checkpoint={"interval": 3, "asynchronous": False})
    command = [str(Path(sys.executable).parent / launcher), "--nproc-per-node" if launcher == "torchrun" else "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), "--", FAULTY, "fault=kill:5", "--config", str(path)]
    with launched(command, tmp_path / "output") as process:
        assert process.wait(600) > 0
    output = (tmp_path / "output").read_text()
    assert "rank 0 lost another rank in step 5" in output and 'rdtrain/train.py", line' not in output, output
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000003"]
    if launcher == "deepspeed":
        result = ranks("--config", path)
        assert result.returncode == 0 and "continuing from step 3" in result.stdout, result.stderr


def test_sigterm_to_the_deepspeed_command_alone_saves_and_leaves_no_process(tiny_config, tmp_path):
    """The command dies of it and tells nobody; its ranks notice."""
    path = tiny_config(engine={"name": "deepspeed"}, schedule={"steps": 4000}, evaluation={"interval": 4000}, checkpoint={"interval": 4000})
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--"]
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 600
    with launched([*command, "launch/train.py", "--config", str(path)], tmp_path / "output") as process:
        while not metrics.exists() or len(read_metrics(metrics)) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        process.wait(300)
        while members(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert len(list(tmp_path.glob("run/checkpoints/step-*/state.json"))) == 1


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_ranks_killed_at_random_moments_change_nothing_of_the_run(tiny_config, tmp_path, ranks, kills):
    """The first and every second kill comes while steps are made and saved, of which every second is, the others at any time from the
    start on."""
    steps = 60 * kills  # enough that no run ends before its last kill
    settings = dict(
        engine={"name": "deepspeed", "zero_stage": 2}, schedule={"steps": steps}, checkpoint={"interval": 2},
        evaluation={"interval": steps},
    )
    whole, path, draw = tiny_config("whole", **settings), tiny_config("killed", **settings), random.Random(kills)
    assert ranks("--config", whole, timeout=3600).returncode == 0
    checkpoints = tmp_path / "killed/checkpoints"
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    for kill in range(kills):
        before, deadline = newest(checkpoints), time.monotonic() + 600
        port = ["--master_port", str(free_port()), "--"]
        with launched([*command, *port, "launch/train.py", "--config", str(path)], tmp_path / "output") as process:
            while newest(checkpoints) == before if kill % 2 == 0 else len(training(process.pid)) < 2:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5 if kill % 2 == 0 else 8))
            os.kill(draw.choice(training(process.pid)), signal.SIGKILL)
            assert process.wait(300) != 0
            while members(process.pid):
                assert time.monotonic() < deadline + 300
                time.sleep(0.05)
    result = ranks("--config", path, timeout=3600)
    assert result.returncode == 0 and "continuing from step" in result.stdout, result.stderr
    last = f"checkpoints/step-{steps:08d}"
    for name in ("model.safetensors", "shard-0.safetensors", "shard-1.safetensors"):
        assert (tmp_path / "whole" / last / name).read_bytes() == (tmp_path / "killed" / last / name).read_bytes()
    losses = [[record["loss"] for record in read_metrics(tmp_path / run / "metrics.jsonl")[1:]] for run in ("whole", "killed")]
    assert losses[0] == losses[1]


def newest(checkpoints: Path) -> str:
    """What the newest checkpoint of a run is called; nothing where there is none."""
    latest = checkpoints / "latest"
    return latest.read_text() if latest.exists() else ""


def training(session: int) -> list[int]:
    """The processes of a launcher's session that train."""
    found = []
    for member in members(session):
        with suppress(OSError):  # it has just ended
            words = Path(f"/proc/{member}/cmdline").read_bytes().split(b"\0")
            found += [member] if any(word.startswith(b"--local_rank=") for word in words) else []
    return found


def members(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found += [int(stat.parent.name)] if int(sid) == session and state != "Z" else []
    return found


class launched:
    """A command in a session of its own, which is ended with the block."""

    def __init__(self, command: list[str], output: Path):
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], start_new_session=True, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> subprocess.Popen:
        return self.process

    def __exit__(self, *error) -> None:
        for member in members(self.process.pid):
            os.kill(member, signal.SIGKILL)
        self.process.wait()
