"""Checkpoints: whole or absent, few enough, never loaded into another model, and a damaged one is passed over for the one before."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rdtrain.checkpoint import Checkpointer, CheckpointSettings, refuse_other_model
from rdtrain.checkpoint_storage import checkpoint_folder, checkpoint_steps
from rdtrain.config import load_config
from rdtrain.distributed import World
from rdtrain.errors import UserError
from rdtrain.export import export
from rdtrain.metrics import read_metrics
from rdtrain.model.recurrent import ModelConfig
from rdtrain.train import train

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def stopped_run(tiny_config, **sections) -> Path:
    """A run of 8 steps that has come to step 4."""
    path = tiny_config(**sections)
    config = load_config(path)
    assert train(config) == 0
    shutil.rmtree(Path(config.run.folder) / "checkpoints/step-00000008")
    return path


@pytest.fixture
def checkpointer(tmp_path):
    """A factory of checkpointers of one folder, and how to save with one: `save(checkpointer, step)`."""
    (tmp_path / "tokenizer").write_bytes(b"pieces")
    engine = SimpleNamespace(snapshot=lambda: {"weight/w": torch.ones(9)}, weights=lambda: {"w": torch.ones(9)})

    def make(**settings) -> SimpleNamespace:
        tokenizer = {"tokenizer.model": tmp_path / "tokenizer"}
        made = Checkpointer(tmp_path / "run", CheckpointSettings(interval=1, **settings), tokenizer, ALONE)
        newest = made.newest_whole()
        return SimpleNamespace(
            newest=newest, after_step=made.after_step, context=made,
            save=lambda step: made.save({"step": step}, engine), finish=made.finish, done=lambda: made._writing.done(),
        )

    return make


@pytest.fixture
def slow_disk(monkeypatch):
    """Makes every file take a while to reach the disk."""
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.1), sync(descriptor)))


FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(fault: OSError):
    """A function that does nothing but fail, where a checkpoint is written."""

    def fail(first, *_, **__):
        if ".step-" in (os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)):
            raise fault

    return fail


def test_a_run_whose_checkpoint_cannot_be_written_says_so_and_continues_later(tiny_config, tmp_path, monkeypatch):
    config = load_config(stopped_run(tiny_config))
    monkeypatch.setattr(os, "fsync", failing(FULL))
    with pytest.raises(UserError, match="checkpoint of step 8 could not be written "):
        train(config)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000004"]
    assert train(config) == 0
    assert checkpoint_steps(tmp_path / "run") == [4, 8]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000008\n"


def test_what_an_older_checkpoint_does_not_name_was_as_it_is_by_default(tmp_path):
    names = ("step", "seconds", "noise", "objective", "objective_state", "precision", "ranks")
    model = asdict(ModelConfig(vocab_size=8))
    del model["unused_tokens"]
    (tmp_path / "state.json").write_text(json.dumps({**dict.fromkeys(names), "model": model, "tokenizer_hash": "a"}))
    refuse_other_model(tmp_path, ModelConfig(vocab_size=8), "a")
    with pytest.raises(UserError, match="unused_tokens is 0 there and 2 here"):
        refuse_other_model(tmp_path, ModelConfig(vocab_size=8, unused_tokens=2), "a")


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("os.fsync", FULL), ("pathlib.Path.mkdir", OSError(errno.EROFS, "Read-only file system")),
        ("rdtrain.checkpoint.publish", OSError(errno.EIO, "Input/output error")), ("os.replace", FULL),
    ],
)
def test_a_failed_save_leaves_the_one_before_and_comes_up_at_the_next_step(
    checkpointer, tmp_path, monkeypatch, call, fault, asynchronous
):
    run = checkpointer(asynchronous=asynchronous)
    run.save(1)
    run.finish()
    monkeypatch.setattr(call, failing(fault))
    words = rf"checkpoint of step 2 could not be written to .*{fault.strerror}.* the last whole one is of step 1: free some disk space"
    with pytest.raises(UserError, match=words), run.context:
        run.save(2)
        assert asynchronous
        while not run.done():
            time.sleep(0.01)
        run.after_step()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000001"]
    assert checkpointer().newest == 1


def test_training_goes_on_while_one_checkpoint_at_a_time_is_written(checkpointer, tmp_path, slow_disk):
    run = checkpointer()
    run.save(1)
    run.after_step()
    assert not run.done() and checkpoint_steps(tmp_path / "run") == []
    run.save(2)  # waits for the first
    assert not run.done() and checkpoint_steps(tmp_path / "run") == [1]
    while not run.done():
        time.sleep(0.01)
    assert checkpoint_steps(tmp_path / "run") == [1]
    run.after_step()
    assert checkpoint_steps(tmp_path / "run") == [1, 2]
    with run.context:
        run.save(3)
    assert checkpoint_steps(tmp_path / "run") == [2, 3]


def test_a_run_that_ends_by_an_error_keeps_the_checkpoint_in_flight(checkpointer, slow_disk):
    run = checkpointer()
    with pytest.raises(UserError, match="not finite"), run.context:
        run.save(1)
        raise UserError("the loss is not finite")
    assert checkpointer().newest == 1


def test_asynchronous_saves_hold_what_synchronous_ones_do(tiny_config, tmp_path, slow_disk):
    """To the bit, though the weights have moved on long before they are written."""
    for name in (True, False):
        settings = {"interval": 4, "asynchronous": name}
        assert train(load_config(tiny_config(str(name), checkpoint=settings, evaluation={"interval": 8}))) == 0
    for step in (4, 8):
        folders = [checkpoint_folder(tmp_path / name, step) for name in ("True", "False")]
        names = [{path.name for path in folder.iterdir()} for folder in folders]
        assert names[0] == names[1] == {"manifest.json", "model.safetensors", "shard-0.safetensors", "state.json", "tokenizer.model"}
        for name in names[0] - {"state.json", "manifest.json"}:  # which hold times
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), (step, name)


def test_a_disk_that_is_really_full(tiny_config, tmp_path, refused):
    """A run on a file system of its own that holds one checkpoint and not two."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("this machine lets an ordinary user mount nothing")
    config = stopped_run(tiny_config)
    for file in (config, tmp_path / "run/config.yaml"):
        file.write_text(file.read_text().replace(str(tmp_path / "run"), str(mount / "run")))
    size = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*")) * 3 // 2
    program = (
        f"mount -t tmpfs -o size={size} tmpfs {mount} && cp -r {tmp_path}/run {mount}/run && "
        f"{{ {sys.executable} -m rdtrain.cli train --config {config}; status=$?; ls -A {mount}/run/checkpoints; exit $status; }}"
    )
    result = subprocess.run(["unshare", "-rm", "sh", "-c", program], capture_output=True, text=True)
    refused(result, "checkpoint of step 8 could not be written", "the last whole one is of step 4", "free some disk space")
    assert result.stdout.split()[-2:] == ["latest", "step-00000004"]


def test_the_newest_are_kept_and_every_so_many(tiny_config, tmp_path):
    settings = {"interval": 1, "keep": 2, "keep_every": 3}
    assert train(load_config(tiny_config(checkpoint=settings, evaluation={"interval": 8}))) == 0
    assert checkpoint_steps(tmp_path / "run") == [3, 6, 7, 8]


def test_a_damaged_checkpoint_counts_for_none_of_those_that_are_kept(checkpointer, tmp_path):
    run = checkpointer(asynchronous=False)
    for step in (1, 2, 3):
        run.save(step)
    (checkpoint_folder(tmp_path / "run", 3) / "state.json").unlink()
    run = checkpointer(asynchronous=False)
    assert run.newest == 2
    run.save(4)
    assert checkpoint_steps(tmp_path / "run") == [2, 4]


def test_a_checkpoint_of_another_model_is_refused(tiny_config, tmp_path, rdtrain, refused):
    assert train(load_config(tiny_config("first"))) == 0
    last = tmp_path / "first/checkpoints/step-00000008"
    second = tiny_config("second", model={"width": 64}, checkpoint={"start_from": str(last)})
    refused(rdtrain("train", "--config", second), "of another model", "width is 32 there and 64 here")
    assert not (tmp_path / "second").exists()
    third = stopped_run(tiny_config, run="third", model={"width": 64})
    shutil.rmtree(tmp_path / "third/checkpoints/step-00000004")
    shutil.copytree(tmp_path / "first/checkpoints/step-00000008", tmp_path / "third/checkpoints/step-00000004")
    refused(rdtrain("train", "--config", third), "of another model", "width is 32 there and 64 here")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny_config, tmp_path, rdtrain):
    """The weights at the end are the same."""
    config = tiny_config(checkpoint={"interval": 2, "keep": 4}, evaluation={"interval": 8})
    assert train(load_config(config)) == 0
    folders = {step: checkpoint_folder(tmp_path / "run", step) for step in (2, 4, 6, 8)}
    end = (folders[8] / "model.safetensors").read_bytes()
    os.truncate(folders[8] / "state.json", 100)
    (folders[6] / "model.safetensors").unlink()
    shard = bytearray((folders[4] / "shard-0.safetensors").read_bytes())
    shard[-1000] ^= 1
    (folders[4] / "shard-0.safetensors").write_bytes(shard)
    reasons = {8: "state.json has 100 bytes", 6: "model.safetensors is missing", 4: "shard-0.safetensors does not have the checksum"}
    verified = rdtrain("checkpoint", "verify", tmp_path / "run")
    assert verified.returncode == 1 and len(verified.stdout.splitlines()) == 4 and f"{folders[2]}: whole" in verified.stdout
    result = rdtrain("train", "--config", config)
    assert result.returncode == 0 and "continuing from step 2" in result.stdout, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: checkpoint")]
    assert len(warnings) == 3
    for step, reason in reasons.items():
        assert f"{folders[step]}: damaged ({reason}" in verified.stdout
        assert sum(f"{folders[step]} is damaged ({reason}" in line and "continues from the one of step 2" in line for line in warnings) == 1
    assert (folders[8] / "model.safetensors").read_bytes() == end


def test_a_run_without_a_whole_checkpoint_stops_and_touches_nothing(tiny_config, tmp_path):
    config = stopped_run(tiny_config)
    folder = checkpoint_folder(tmp_path / "run", 4)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    reason = "model.safetensors does not have the checksum"
    with pytest.raises(UserError, match=f"none of the 1 checkpoints in .* is whole .of step 4, {reason}.*delete that folder to train from"):
        train(load_config(config))
    with pytest.raises(UserError, match=f"step-00000004 is damaged .{reason}"):
        export(tmp_path / "run", tmp_path / "model")
    with pytest.raises(UserError, match=f"step-00000004 is damaged .{reason}"):
        train(load_config(tiny_config("next", checkpoint={"start_from": str(folder)})))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch._dynamo  # the first optimizer of a process imports it, for seconds
from rdtrain.config import load_config
from rdtrain.train import train

config = load_config(Path(sys.argv[1]))
CALLS = {"fsync", "replace", "rename", "unlink", "rmdir"}

def trained(stage=None):  # in a process of its own, which dies in any of its threads before the call of that number
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0
    def count(frame, event, function):
        nonlocal calls
        if event == "c_call" and function.__name__ in CALLS and getattr(function, "__module__", None) == "posix":
            if calls == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
    threading.setprofile(count)
    sys.setprofile(count)
    os._exit(train(config))

kills = 0
for stage in map(int, sys.argv[2:]):
    code = trained(stage)
    assert code in (0, -signal.SIGKILL), code
    kills += code != 0
assert trained() == 0
print("kills", kills)
"""


def test_a_run_killed_in_its_saves_ends_as_if_nothing_had_happened(tiny_config, tmp_path):
    """Real kills: each start lives for so many more calls to the file system, of whichever thread."""
    settings = {"checkpoint": {"interval": 2}, "evaluation": {"interval": 8}}
    assert train(load_config(tiny_config("whole", **settings))) == 0
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_config("parts", **settings)), "4", "9", "14", "19", "21", "24", "16", "30"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 6 and checkpoint_steps(tmp_path / "parts") == [6, 8]
    weights = [(checkpoint_folder(tmp_path / run, 8) / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert [path.name for path in (tmp_path / "parts/checkpoints").glob(".*")] == []


def test_a_folder_without_a_checkpoint_cannot_be_started_from(tiny_config, tmp_path, rdtrain, refused):
    refused(rdtrain("train", "--config", tiny_config(checkpoint={"start_from": str(tmp_path)})), "is not an rdtrain checkpoint")


def test_records_after_the_checkpoint_are_dropped_on_resume(tiny_config, tmp_path):
    config = load_config(stopped_run(tiny_config))
    assert [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(9))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short by a kill
    assert train(config) == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(9))


def test_copies_beside_the_checkpoints_are_neither_counted_nor_deleted(tiny_config, tmp_path):
    config = load_config(stopped_run(tiny_config))
    for name in ("step-00000004.bak", "step-00000004-copy", "step-x"):
        shutil.copytree(tmp_path / "run/checkpoints/step-00000004", tmp_path / "run/checkpoints" / name)
    assert checkpoint_steps(tmp_path / "run") == [4]
    assert train(config) == 0
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 6


def test_a_damaged_line_of_metrics_is_named_before_anything_is_rewritten(tiny_config, tmp_path):
    config = load_config(stopped_run(tiny_config))
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_bytes(b"5\n" + metrics.read_bytes())
    before = metrics.read_bytes()
    with pytest.raises(UserError, match="line 1 of .*metrics.jsonl is not a record"):
        train(config)
    assert metrics.read_bytes() == before


def test_memory_that_runs_out_is_one_sentence(tiny_config, rdtrain, refused):
    refused(rdtrain("train", "--config", tiny_config(model={"width": 800_000_000})), "out of memory", "micro_sequences")
