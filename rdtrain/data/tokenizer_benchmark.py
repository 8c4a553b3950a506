"""`rdtrain tokenizer benchmark`: how fast tokenizers encode a text, on one core and on all.

Notable: tokenizers take turns, several times, so that what else the machine does falls on all of them alike, and each is given by its
median. MB a processor second (user and system, all threads) stand beside MB/s on the clock, and ratios are theirs, since other work moves
them less. On all cores means as many processes, each with its share of the documents, as sharding has it: starting them is not counted.
"""

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..model.tokenizer import Tokenizer
from .encoding import BATCH_CHARACTERS
from .sources import list_files, read_documents


def benchmark_tokenizers(paths: list[Path], inputs: list[Path], megabytes: float = 10, workers: int = 1, rounds: int = 3) -> str:
    """A table in Markdown, a row for each tokenizer of `paths`: MB (10**6 bytes of text) a second, and ratios to the first tokenizer.

    inputs: as `rdtrain.data.sources.list_files` takes them; the first `megabytes` of them are encoded. workers: processes of the
    second measurement. rounds: turns of each tokenizer. UserError when there is no text, and for settings out of range.
    """
    if not megabytes > 0 or workers < 1 or rounds < 1:
        raise UserError(f"{megabytes} MB, {workers} workers and {rounds} rounds measure nothing; give more than 0 of each")
    try:
        tokenizers = [Tokenizer(path) for path in paths]
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    batches = list(_batches(inputs, megabytes * 1e6))
    size = sum(len(text.encode()) for batch in batches for text in batch)
    if not size:
        raise UserError(f"there is no text in {', '.join(map(str, inputs))}; give files that hold some")
    tokens = [sum(len(ids) for batch in batches for ids in tokenizer.encode_batch(batch)) for tokenizer in tokenizers]
    seconds = [[] for _ in tokenizers]  # of each tokenizer and round: clock and processors on one core, clock and processors on all
    files = [tokenizer.file for tokenizer in tokenizers]
    with multiprocessing.get_context("spawn").Pool(workers, _start, (files, batches)) as pool:
        for _ in range(rounds):
            for number, of_rounds in enumerate(seconds):
                alone = pool.apply(_encode, (number, 0, 1))
                started = time.perf_counter()
                together = pool.starmap(_encode, [(number, share, workers) for share in range(workers)], chunksize=1)
                of_rounds.append((*alone, time.perf_counter() - started, sum(processor for _, processor in together)))
    rates = [[size / 1e6 / statistics.median(times) for times in zip(*of_rounds)] for of_rounds in seconds]
    titles = ("tokenizer", "pieces", "bytes a token", "MB/s on one core", "MB a processor second", "to the first",
              f"MB/s in {workers} processes", "MB a processor second", "to the first")
    rows = [f"| {' | '.join(titles)} |", "|---|" + "--:|" * (len(titles) - 1)]
    for path, tokenizer, count, (clock, processor, clocks, processors) in zip(paths, tokenizers, tokens, rates):
        figures = (size / count, clock, processor, processor / rates[0][1], clocks, processors, processors / rates[0][3])
        rows.append(f"| {path} | {tokenizer.vocab_size:,} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join(rows)


def _batches(inputs: list[Path], size: float) -> Iterator[list[str]]:
    """Documents, as many together as sharding encodes at a time."""
    batch, characters = [], 0
    for text in read_documents(list_files(inputs), "text"):
        batch.append(text[: int(size)])
        characters += len(batch[-1])
        size -= len(batch[-1].encode())
        if characters >= BATCH_CHARACTERS or size <= 0:
            yield batch
            batch, characters = [], 0
        if size <= 0:
            return
    yield batch


def _start(files: list[Path], batches: list[list[str]]) -> None:
    """What each process keeps: the tokenizers, and the text, for any share of it."""
    global _kept
    _kept = [Tokenizer(file) for file in files], batches


def _encode(number: int, share: int, shares: int) -> tuple[float, float]:
    """The seconds, on the clock and of the processors, that one tokenizer takes for a share of the documents; its ids are dropped."""
    tokenizers, batches = _kept
    started = time.perf_counter(), time.process_time()
    for batch in batches:
        tokenizers[number].encode_batch(batch[share::shares])
    return time.perf_counter() - started[0], time.process_time() - started[1]
