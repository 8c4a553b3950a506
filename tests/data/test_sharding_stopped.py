"""Sharding that is stopped or killed at any moment and started again writes the folder that it would have written."""

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from rdtrain.data.sharding import write_shards

PROCESS = Path(__file__).parent / "sharding_process.py"


class Sharding:
    """Runs of sharding_process.py."""

    def __init__(self, *arguments):
        self._process = subprocess.Popen([sys.executable, str(PROCESS), *map(str, arguments)], stdin=subprocess.PIPE, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def run(self, draw=None, seconds=None):
        """Whether a run was killed. draw: it, or one of its two workers, is to be at a random moment; seconds: (of the processor's time
        without workers, of the clock's with two) that whole runs took."""
        alone = draw is not None and draw.random() < 0.75
        print(1 if alone else 2, draw.uniform(0, seconds[0]) if alone else 0, file=self._process.stdin, flush=True)
        victim, expected = psutil.Process(int(self._process.stdout.readline())), -signal.SIGPROF if alone else 0
        moment = draw.expovariate(1 / seconds[1]) if draw and not alone else None
        if moment is not None and not select.select([self._process.stdout], [], [], moment)[0]:
            try:
                workers = victim.children()
                expected = 2 if workers and draw.random() < 0.5 else -signal.SIGKILL
                (draw.choice(workers) if expected == 2 else victim).kill()
            except psutil.NoSuchProcess:  # it has just ended
                pass
        code = int(self._process.stdout.readline())
        assert code in (0, expected)
        return code != 0

    def close(self):
        self._process.stdin.close()
        assert self._process.wait() == 0


@pytest.mark.parametrize("kills", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_kills_change_nothing(mixed, tokenizer, tmp_path, kills, content):
    """At random moments of runs that continue each other, and begin anew when the shards are whole; each result is compared."""
    before = time.process_time()
    write_shards([mixed], tokenizer, tmp_path / "whole", 2000, validation_share=0.2, unit_bytes=2000)
    alone, whole, draw = time.process_time() - before, content(tmp_path / "whole"), random.Random(kills)
    killed = finished = 0
    with closing(Sharding(mixed, tokenizer.file, tmp_path / "killed")) as sharding:
        before = time.perf_counter()
        assert not sharding.run()
        seconds = alone, time.perf_counter() - before
        while killed < kills:
            shutil.rmtree(tmp_path / "killed")
            while sharding.run(draw if killed < kills else None, seconds):
                killed += 1
                print(f"{killed} kills, {finished} results")
            finished += 1
            assert content(tmp_path / "killed") == whole
            assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]


ORPHAN = """
import multiprocessing, os, pathlib, sys
from rdtrain.data.workers import _serve
context = multiprocessing.get_context("spawn")
connection, other = context.Pipe()
worker = context.Process(target=_serve, args=(other, pathlib.Path(sys.argv[1]).write_text))
worker.start()
connection.send("a task")
print(worker.pid, flush=True)
os._exit(0)
"""


def test_a_worker_that_starts_when_its_parent_is_dead_does_nothing(tmp_path):
    """It would work beside the next run, in a folder that has become the output since."""
    orphan = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path / "file")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.perf_counter() + 600
    while psutil.pid_exists(int(orphan.stdout)) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


class Stopped(BaseException):
    """What a kill is played by where everything happens in one process."""


@pytest.fixture(scope="module")
def stop_at():
    """stop_at(n, folder) raises Stopped when a file in the folder is to be created, renamed or deleted for the n-th time, from 0; n
    negative: never. Its `seen` counts those times."""
    def arm(number, folder):
        arm.seen, arm.number, arm.folder = 0, number, str(folder)

    def hook(event, arguments):
        if not event.startswith(("open", "os.", "shutil.rmtree")) or arm.folder is None or not str(arguments[0]).startswith(arm.folder):
            return
        if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or event == "open" and str(arguments[1])[:1] in "wxa+":
            arm.seen += 1
            if arm.seen == arm.number + 1:
                arm.folder = None
                raise Stopped

    arm.folder = None
    sys.addaudithook(hook)
    yield arm
    arm.folder = None


@pytest.mark.parametrize("share", [0.15, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_before_any_change_on_disk_it_continues(documents, tokenizer, tmp_path, stop_at, share, lines, content):
    """A share of all the moments at which a file appears, moves or goes, the replacing of an old output among them."""
    (tmp_path / "a.jsonl").write_bytes(lines(documents[:30] + documents[:3]))
    options = {"shard_tokens": 500, "unit_bytes": 1000, "validation_share": 0.3, "overwrite": True}
    (tmp_path / "whole" / "train").mkdir(parents=True)
    (tmp_path / "whole" / "train" / "manifest.json").write_text("old")
    stop_at(-1, tmp_path)
    write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "whole", **options)
    moments, whole, draw = stop_at.seen, content(tmp_path / "whole"), random.Random(0)
    assert moments > 50
    for number in range(moments):
        if draw.random() >= share:
            continue
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out" / "train").mkdir(parents=True)
        (tmp_path / "out" / "train" / "manifest.json").write_text("old")
        stop_at(number, tmp_path)
        with pytest.raises(Stopped):
            write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", **options)
        stop_at.folder = None
        time.sleep(0.05)  # zarr's threads write on, which they would not after a kill
        unfinished = not (tmp_path / ".out.unfinished" / "complete").exists()
        for folder in tmp_path.glob(".out.unfinished/result/*/arrays.zarr/tokens/c") if unfinished else ():
            (folder / "half-written.partial").write_text("what a kill would have left")
        if (tmp_path / "out").exists():
            assert content(tmp_path / "out") in (whole, {"train/manifest.json": b"old"}), number
        write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", **options)
        assert content(tmp_path / "out") == whole, number
        assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out", "whole"], number
