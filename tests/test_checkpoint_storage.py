"""Checkpoint folders: what is written is what others read, every damage is found, and a kill at any moment leaves whole ones only."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rdtrain.checkpoint_storage import (
    checkpoint_folder,
    checkpoint_steps,
    find_damage,
    publish,
    temporary_folder,
    write_files,
    written_files,
)

TENSORS = {
    "bfloat": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5), "scalar": torch.tensor(7.0),
    "bytes": torch.arange(5, dtype=torch.uint8), "turned": torch.arange(12.0).reshape(3, 4).T, "none": torch.zeros(0, 4),
    "truth": torch.tensor([True, False, True]),
    "whole": torch.tensor([-(2**40), 3]), "large": torch.arange(5_000_000.0),
}


def saved(run: Path, step: int) -> Path:
    """A checkpoint of two ranks, in the order in which rank 0 and 1 would write it."""
    folder, target = temporary_folder(run, step, start=1), checkpoint_folder(run, step)
    write_files(folder, 1, {"shard-1.safetensors": {"b": torch.full((300,), float(step))}})
    assert written_files(folder, 2) is None  # rank 0 is not done
    state = json.dumps({"step": step}).encode()
    write_files(folder, 0, {"shard-0.safetensors": {"a": torch.full((200,), float(step))}, "state.json": state})
    publish(folder, target, written_files(folder, 2))
    return target


def test_files_are_safetensors_and_the_manifest_knows_their_bytes(tmp_path):
    (tmp_path / "other").write_bytes(b"copied")
    manifest = write_files(tmp_path / "new", 3, {"t.safetensors": TENSORS, "copy": tmp_path / "other", "text": b""})
    read = load_file(tmp_path / "new/t.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and read[name].equal(tensor), name
    for name in ("t.safetensors", "copy", "text"):
        content = (tmp_path / "new" / name).read_bytes()
        assert manifest[name] == {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    assert json.loads((tmp_path / "new/manifest-3.json").read_text()) == manifest


def flip(path: Path, where: float = 0.9) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 16
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", ["shard-0.safetensors", "shard-1.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "missing"), (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes and was"), (lengthen, "bytes and was"),
        (flip, "checksum"), (lambda path: flip(path, 0.0), "checksum"), (lambda path: path.write_bytes(b""), "bytes and was"),
        (lambda path: path.write_bytes(b"{}"), "bytes and was"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes and was|cannot be read"),
    ],
    ids=["missing", "cut", "longer", "bit", "first bit", "empty", "braces", "folder"],
)
def test_every_damage_is_found_and_named(tmp_path, name, change, reason):
    folder = saved(tmp_path, 100)
    assert find_damage(folder) is None
    change(folder / name)
    damage = find_damage(folder)
    assert damage is not None
    if name != "manifest.json":  # which may as well name another file when a bit of it is turned
        assert name in damage and any(words in damage for words in reason.split("|")), damage
        assert find_damage(folder, {"shard-0.safetensors", "shard-1.safetensors", "state.json"} - {name}) is None
        assert any(find_damage(folder, rank=rank, ranks=2) for rank in range(2))


def test_ranks_share_the_reading(tmp_path, monkeypatch):
    """Every file is read once, by one of the ranks, however many there are."""
    folder, read = saved(tmp_path, 100), []
    original = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: read.append(len(data)) or original(data, value))
    for ranks in (1, 2, 5):
        read.clear()
        assert [find_damage(folder, rank=rank, ranks=ranks) for rank in range(ranks)] == [None] * ranks
        assert sorted(read) == sorted(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def test_everything_is_on_the_disk_before_the_rename_that_shows_it(tmp_path, monkeypatch):
    """Of a power cut nothing can be seen here but the order of calls."""
    synced, shown = set(), []
    sync, replace = os.fsync, os.replace

    def watched_sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def watched_replace(source, target):
        inside = {path.stat().st_ino for path in Path(source).iterdir()} if Path(source).is_dir() else set()
        assert {*inside, os.stat(source).st_ino} <= synced, (source, target)
        if Path(target).name == "latest":
            assert os.stat(Path(target).parent).st_ino in synced
        shown.append(Path(target).name)
        replace(source, target)
        synced.discard(os.stat(Path(target).parent).st_ino)  # its names have changed

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    saved(tmp_path, 100)
    assert shown == ["manifest-1.json", "manifest-0.json", "step-00000100", "latest"]
    assert os.stat(tmp_path / "checkpoints").st_ino in synced


KILLED = """
import os, signal, sys
from pathlib import Path
from rdtrain.checkpoint_storage import checkpoint_folder, checkpoint_steps, find_damage, remove, sweep
from tests.test_checkpoint_storage import saved

run, redo = Path(sys.argv[1]), sys.argv[2] == "redo"
CALLS = {"open", "write", "flush", "fsync", "close", "rename", "replace", "unlink", "remove", "rmdir", "mkdir"}

def killed_at(stage):  # a process that saves a checkpoint and then drops the one before, and dies before the call of that number
    calls = 0
    def count(frame, event, function):
        nonlocal calls
        if event == "c_call" and function.__name__ in CALLS:
            if calls == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
    child = os.fork()
    if child == 0:
        sys.setprofile(count)
        saved(run, 200)
        remove(checkpoint_folder(run, 100))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

stage, seen = 0, set()
while True:
    saved(run, 100)
    if redo:  # the place of the new one is taken by a damaged one
        (saved(run, 200) / "state.json").write_text("{")
        (run / "checkpoints/latest").write_text("step-00000100")
    code = killed_at(stage)
    whole = [step for step in checkpoint_steps(run) if find_damage(checkpoint_folder(run, step)) is None]
    assert whole in ([100], [100, 200], [200]), (stage, whole)
    assert redo or whole == checkpoint_steps(run), stage
    latest = (run / "checkpoints/latest").read_text().strip()
    assert latest in [f"step-{step:08d}" for step in whole], (stage, latest, whole)
    seen.add(tuple(whole))
    sweep(run)
    assert not list(run.glob("checkpoints/.step*")), stage
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    remove(checkpoint_folder(run, 200))
    stage += 1
assert whole == [200] and seen == {(100,), (100, 200), (200,)}
print(stage)
"""


@pytest.mark.parametrize("kind", ["new", "redo"])
def test_a_kill_at_any_call_leaves_whole_checkpoints_and_a_latest_that_is_one(tmp_path, kind):
    """Real processes, killed before each call that touches the disk in turn, by a hook of the interpreter's."""
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), kind], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50  # calls of one save
    assert checkpoint_steps(tmp_path) == [200]
