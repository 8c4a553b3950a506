"""`rdtrain shard benchmark`: how fast sharding is beside the tokenizer alone, and how much memory it takes as the input grows.

The text is lines of the standard library's docstrings, put together at random into documents of about 3,000 bytes, as JSON Lines; the
same for the same size and Python.

Notable: both sides run in as many processes. The bare tokenizer has its text in memory and drops what it computes, and is the mean of a
turn before and one after, as a machine's speed drifts; sharding is the command that a user types, from its start to its end. Time on the
processors (user and system, all processes) is given beside the time on the clock, since other work on the machine moves it less.
"""

import json
import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..errors import UserError
from ..model.tokenizer import Tokenizer
from .docstrings import docstrings
from .encoding import BATCH_CHARACTERS

LINES_OF_A_DOCUMENT = 70
BARE_BYTES = 50_000_000  # of text that the bare tokenizer encodes, at most
SAMPLES_A_SECOND = 10  # of the memory


def benchmark(tokenizer: Tokenizer, folder: Path, megabytes: list[int], workers: list[int]) -> str:
    """A table in Markdown, a row for each size of input in MB (10**6 bytes) and each number of workers. `folder` must not exist; it is
    deleted at the end.

    Each row is shown on standard error as soon as it is measured. UserError when the folder exists or sharding fails.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder to work in")
    titles = ("input MB", "workers", "tokens", "s", "MB/s", "bare tokenizer MB/s", "share", "processor s/GB", "bare", "share",
              "peak memory MiB")
    rows = [f"| {' | '.join(titles)} |", "|--:" * len(titles) + "|"]
    folder.mkdir(parents=True)
    try:
        for size in megabytes:
            text = folder / "text.jsonl"
            write_text(text, size * 10**6)
            for count in workers:
                rows.append(_row(tokenizer, folder, text, size, count))
                print(rows[-1], file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    return "\n".join(rows)


def _row(tokenizer: Tokenizer, folder: Path, text: Path, size: int, workers: int) -> str:
    before = _bare(tokenizer, text, workers)
    elapsed, processor, peak = _shard(tokenizer, text, folder / "shards", workers)
    bare_speed, bare_cost = (sum(pair) / 2 for pair in zip(before, _bare(tokenizer, text, workers)))
    manifest = json.loads((folder / "shards" / "manifest.json").read_text())
    shutil.rmtree(folder / "shards")
    speed, cost = manifest["text_bytes"] / elapsed, processor / manifest["text_bytes"]
    cells = (f"{size:,}", workers, f"{manifest['tokens']:,}", f"{elapsed:.1f}", f"{speed / 1e6:.2f}", f"{bare_speed / 1e6:.2f}",
             f"{speed / bare_speed:.0%}", f"{cost * 1e9:.0f}", f"{bare_cost * 1e9:.0f}", f"{bare_cost / cost:.0%}", f"{peak / 2**20:,.0f}")
    return f"| {' | '.join(map(str, cells))} |"


def write_text(file: Path, size: int) -> None:
    """Writes JSON Lines of about `size` bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    lines = [line for source in sorted(library.glob("*.py")) for text in docstrings(source) for line in text.splitlines() if line.strip()]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as output:
        while size > 0:
            size -= output.write(json.dumps({"text": "\n".join(draw.choices(lines, k=LINES_OF_A_DOCUMENT))}, ensure_ascii=False) + "\n")


def _bare(tokenizer: Tokenizer, file: Path, workers: int) -> tuple[float, float]:
    """(bytes of text in a second, processor seconds for a byte) of the tokenizer alone."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers + 1), context.Queue()
    processes = [context.Process(target=_encode, args=(tokenizer.file, file, number, workers, barrier, results), daemon=True)
                 for number in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    sizes, seconds = zip(*(results.get() for _ in processes))
    elapsed = time.perf_counter() - started
    for process in processes:
        process.join()
    return sum(sizes) / elapsed, sum(seconds) / sum(sizes)


def _encode(tokenizer_file: Path, file: Path, number: int, workers: int, barrier, results) -> None:
    tokenizer = Tokenizer(tokenizer_file)
    batches, size = list(_batches(file, number, workers)), 0
    barrier.wait()
    started = time.process_time()
    for batch in batches:
        tokenizer.encode_batch(batch)
    seconds = time.process_time() - started
    size = sum(len(text.encode()) for batch in batches for text in batch)
    results.put((size, seconds))


def _batches(file: Path, number: int, workers: int) -> Iterator[list[str]]:
    """Every workers-th document from `number` on, as many together as sharding encodes at a time."""
    batch, characters, read = [], 0, 0
    with file.open(encoding="utf-8") as lines:
        for place, line in enumerate(lines):
            read += len(line)
            if place % workers == number:
                batch.append(json.loads(line)["text"])
                characters += len(batch[-1])
            if batch and (characters >= BATCH_CHARACTERS or read >= BARE_BYTES):
                yield batch
                batch, characters = [], 0
            if read >= BARE_BYTES:
                return
    if batch:
        yield batch


def _shard(tokenizer: Tokenizer, file: Path, output: Path, workers: int) -> tuple[float, float, int]:
    """(seconds, processor seconds, peak of the resident memory of all processes together in bytes) of `rdtrain shard`."""
    before = _processor_seconds()
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rdtrain.cli", "shard", str(file), "--tokenizer", str(tokenizer.file), "--output",
                                str(output), "--workers", str(workers)], stdout=subprocess.DEVNULL)
    peak, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        memory = 0
        try:
            for one in (watched, *watched.children(recursive=True)):
                memory += one.memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            pass
        peak = max(peak, memory)
        time.sleep(1 / SAMPLES_A_SECOND)
    elapsed = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"rdtrain shard ended with code {process.returncode}; its message is above")
    return elapsed, _processor_seconds() - before, peak


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
