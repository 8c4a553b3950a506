"""Checkpoints: whole or absent, few enough, and never loaded into another model."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rdtrain.checkpoint import checkpoint_steps
from rdtrain.config import load_config
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.train import train


def stopped_run(tiny_config, **sections) -> Path:
    """A run of 8 steps that has come to step 4."""
    path = tiny_config(**sections)
    config = load_config(path)
    assert train(config) == 0
    shutil.rmtree(Path(config.run.folder) / "checkpoints/step-00000008")
    return path


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_failed_save_leaves_the_checkpoint_before_it_and_says_so(tiny_config, tmp_path, monkeypatch, fault):
    config = load_config(stopped_run(tiny_config))
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(fault))
    with pytest.raises(UserError, match=r"checkpoint of step 8 could not be written .* the last whole one is of step 4.*free some disk"):
        train(config)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(config) == 0
    assert checkpoint_steps(tmp_path / "run") == [4, 8]


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
    assert result.stdout.split()[-1] == "step-00000004"


def test_only_the_newest_are_kept(tiny_config, tmp_path):
    assert train(load_config(tiny_config(checkpoint={"interval": 2, "keep": 3}))) == 0
    assert checkpoint_steps(tmp_path / "run") == [4, 6, 8]


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


def test_a_damaged_checkpoint_is_named(tiny_config, tmp_path, rdtrain, refused):
    config = stopped_run(tiny_config)
    file = tmp_path / "run/checkpoints/step-00000004/shard-0.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    refused(rdtrain("train", "--config", config), "step-00000004 cannot be loaded", "damaged")


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
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 5


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff\xfe", b""])
def test_a_damaged_state_is_one_sentence(tiny_config, tmp_path, content):
    config = load_config(stopped_run(tiny_config))
    (tmp_path / "run/checkpoints/step-00000004/state.json").write_bytes(content)
    with pytest.raises(UserError, match="is not an rdtrain checkpoint"):
        train(config)


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
