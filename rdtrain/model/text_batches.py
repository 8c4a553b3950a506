"""Many prompts from a file: `python FOLDER --jsonl IN OUT`.

A line of IN is {"prompt": TEXT} and may have a "seed"; without one a line's seed is --seed plus its number, from 0. OUT gets a line for
each, in order: prompt, continuation, tokens (how many), ended, seed, setting, and iterations_used, the mean, where the setting has an exit.
Notable: started again, it keeps the whole lines of OUT and goes on behind them. What a prompt draws does not depend on its batch.
"""

import codecs
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch

from .generation import TextGenerator
from .sampling import Sampling


def read_prompts(path: Path, seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of each line. ValueError, in one sentence with the line's number, for what is no such file."""
    prompts = []
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): correct the path") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line.decode())
            prompt, own_seed = tree["prompt"], tree.get("seed", seed + len(prompts))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the last of brackets within brackets
            prompt = own_seed = None
        if not isinstance(prompt, str) or type(own_seed) is not int:
            raise ValueError(f'line {number} of {path} is not {{"prompt": TEXT}} in UTF-8, with a whole "seed" or none: mend it')
        prompts.append((prompt, own_seed))
    return prompts


@contextmanager
def claimed(path: Path) -> Iterator[TextIO]:
    """An output, open behind what it has, for this process alone: two would both write what neither has found there.

    ValueError, in one sentence, for one that another process has, where the disk refuses, and for what is no file: a terminal or a device
    would be read without an end.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, which OUT must be, as its whole lines are kept: give another output")
    try:
        with path.open("a", encoding="utf-8") as file:
            with suppress(ImportError):  # Windows has none
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(f"{path} is being written by another process: wait for its end, or give another output") from None
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): see to its disk and folder, and start the same command again, "
                         "which keeps its whole lines") from None


def keep_whole_lines(path: Path, expected: list[dict]) -> int:
    """How many lines of an output are whole; a part of one behind them is cut off. ValueError when they are not those of `expected`."""
    *lines, part = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, part] if part else lines):
        try:
            facts = expected[number]
            if number < len(lines):
                tree = json.loads(line)
                same = all(tree[name] == value for name, value in facts.items())
            else:  # begun by a process that was killed; of another file, which may be IN itself, nothing is cut off
                start = f'{{"prompt": {json.dumps(facts["prompt"], ensure_ascii=False)}, "continuation": "'.encode()
                same = line[: len(start)] == start[: len(line)]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            same = False
        if not same:
            raise ValueError(f"line {number + 1} of {path} is of another prompt, seed or setting: give another output, or the same input "
                             "and settings")
    os.truncate(path, sum(len(line) + 1 for line in lines))
    return len(lines)


def continue_prompts(generator: TextGenerator, source: Path, output: Path, iterations: int | None, sampling: Sampling, seed: int,
                     max_new_tokens: int, batch: int, context: int) -> None:
    """Write the continuation of each line of `source` to `output`, so many at a time; each batch is on the disk when the next begins.

    context: positions that a text may have. ValueError, in one sentence, for what is wrong with the files or the settings, before any
    work.
    """
    if batch < 1 or max_new_tokens < 1:
        raise ValueError(f"--batch and --max-new-tokens must be at least 1, and they are {batch} and {max_new_tokens}")
    prompts, tokenizer = read_prompts(source, seed), generator.tokenizer
    setting = {"iterations": generator.iterations if iterations is None else iterations, "max_new_tokens": max_new_tokens, **vars(sampling)}
    try:
        ids = [[tokenizer.bos_id] + tokens for tokens in tokenizer.encode_batch([prompt for prompt, _ in prompts])]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    longest = max(map(len, ids), default=1)
    if longest + max_new_tokens > context:
        number = next(number for number, one in enumerate(ids, start=1) if len(one) == longest)
        raise ValueError(f"prompt {number} of {source} has {longest} tokens, and with {max_new_tokens} more it is longer than the "
                         f"{context} that the cache holds: shorten it, or raise --context")
    with claimed(output) as file:
        done = keep_whole_lines(output, [{"prompt": prompt, "seed": one, "setting": setting} for prompt, one in prompts])
        batch = max(1, min(batch, len(prompts) - done))
        decoder = generator.decoder(batch, longest + max_new_tokens, iterations, sampling)
        progress = Progress(len(prompts), done)
        for start in range(done, len(prompts), batch):
            rows = list(range(start, min(start + batch, len(prompts))))
            rows += rows[-1:] * (batch - len(rows))  # a decoder's batch has one size
            length = max(len(ids[row]) for row in rows)
            padding = [length - len(ids[row]) for row in rows]
            padded = torch.tensor([[tokenizer.bos_id] * width + ids[row] for row, width in zip(rows, padding)])
            decoder.truncate(0)
            steps = list(decoder.generate(padded, [prompts[row][1] for row in rows], max_new_tokens, tokenizer.eos_id, padding))
            tokens = torch.stack(steps, dim=1).tolist()
            used = torch.stack(decoder.iterations_used, dim=1).tolist() if decoder.iterations_used else None
            written = 0
            for place, row in enumerate(range(start, min(start + batch, len(prompts)))):
                ended = tokenizer.eos_id in tokens[place]
                kept = tokens[place][: tokens[place].index(tokenizer.eos_id)] if ended else tokens[place]
                line = {
                    "prompt": prompts[row][0], "continuation": tokenizer.decode(kept), "tokens": len(kept), "ended": ended,
                    "seed": prompts[row][1], "setting": setting,
                }
                if used is not None:
                    line["iterations_used"] = sum(used[place][: len(kept)]) / max(len(kept), 1)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += len(kept)
            file.flush()
            os.fsync(file.fileno())
            progress.add(min(batch, len(prompts) - start), written)
    progress.close()


class Progress:
    """A line on standard error: texts done, of how many, tokens a second, and the time left. At a terminal it is drawn over itself."""

    def __init__(self, total: int, done: int):
        self._total, self._first, self._done, self._tokens = total, done, done, 0
        self._started = time.perf_counter()

    def add(self, texts: int, tokens: int) -> None:
        """So many more are done."""
        self._done, self._tokens = self._done + texts, self._tokens + tokens
        if sys.stderr.isatty():
            print(f"\r{self._line()}\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The last line stays."""
        print(f"\r{self._line()}\033[K" if sys.stderr.isatty() else self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.perf_counter() - self._started
        left = seconds / max(self._done - self._first, 1) * (self._total - self._done)
        bar = "#" * (20 * self._done // max(self._total, 1))
        kept = f", {self._first} of them kept" if self._first else ""
        return (f"[{bar:20}] {self._done}/{self._total} texts{kept}, {self._tokens / max(seconds, 1e-9):.1f} tokens/s, "
                f"{left / 60:.0f}:{left % 60:02.0f} left")
