"""Prompts from held-out text, and what a model writes after them.

Notable: a prompt and its human continuation lie within one document. A continuation ends where the model ends the document; what
it writes after that belongs to another text and is dropped.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..data.output import write_atomically
from ..data.shards import ShardReader
from ..errors import UserError
from ..model.decoding import Decoder, cache_bytes
from ..model.generation import Sampling, TextGenerator
from ..model.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what bytes of a character that is not complete decode to


@dataclass
class Sample:
    """One continuation of one prompt: a line of a samples file.

    model, setting: who wrote it, and how (iterations and the settings of sampling). prompt_number: which prompt; number: which of
    its continuations, from 0. prompt, continuation, human: texts; prompt_ids, continuation_ids, human_ids: the same as tokens of
    the tokenizer with this hash. ended: whether the model ended the document. iterations_used: of each token of the continuation, where
    the setting has an exit; else empty.
    """

    model: str
    setting: dict
    prompt_number: int
    number: int
    prompt: str
    continuation: str
    human: str
    prompt_ids: list[int]
    continuation_ids: list[int]
    human_ids: list[int]
    ended: bool
    tokenizer_hash: str
    iterations_used: list[int] = field(default_factory=list)


def setting_label(setting: dict) -> str:
    """A setting as tables and plots name it."""
    return f"K {setting['iterations']}, temperature {setting['temperature']:g}"


def choose_prompts(reader: ShardReader, count: int, prompt_tokens: int, new_tokens: int) -> np.ndarray:
    """Windows of prompt_tokens + new_tokens tokens, int64 [count, prompt_tokens + new_tokens], spread evenly over the text.

    Each lies within one document (whose opening mark may be the first token). UserError when there are not so many.
    """
    length = prompt_tokens + new_tokens
    documents = reader.documents
    # A document's windows start at its opening mark or later and end before its closing mark.
    room = np.maximum(np.diff(documents) - length, 0)
    before = np.concatenate(([0], room.cumsum()))
    if before[-1] < count:
        raise UserError(
            f"{reader.path} has room for {before[-1]} prompts of {prompt_tokens} tokens with {new_tokens} to follow in the same "
            f"document, and {count} are wanted: lower --prompts, --prompt-tokens or --new-tokens, or give more text"
        )
    places = (2 * np.arange(count) + 1) * before[-1] // (2 * count)
    document = np.searchsorted(before, places, side="right") - 1
    starts = documents[document] + places - before[document]
    return np.stack([reader.read(int(start), int(start) + length) for start in starts]).astype(np.int64)


def texts_of(tokenizer: Tokenizer, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> tuple[str, str]:
    """Prompt and continuation as text. A character that both have bytes of belongs to the continuation."""
    prompt = tokenizer.decode(prompt_ids).rstrip(INCOMPLETE)
    return prompt, tokenizer.decode([*prompt_ids, *continuation_ids])[len(prompt) :]


def human_samples(tokenizer: Tokenizer, windows: np.ndarray, prompt_tokens: int) -> list[Sample]:
    """The prompts, each continued by the human text that follows it: what judges may read before any model has written."""
    samples = []
    for number, window in enumerate(windows.tolist()):
        prompt_ids, human_ids = window[:prompt_tokens], window[prompt_tokens:]
        prompt, human = texts_of(tokenizer, prompt_ids, human_ids)
        samples.append(Sample("human", {}, number, 0, prompt, human, human, prompt_ids, human_ids, human_ids, False, tokenizer.hash))
    return samples


def generate_samples(generator: TextGenerator, name: str, prompts: list[Sample], continuations: int, iterations: int, sampling: Sampling,
                     batch: int | None, seed: int) -> list[Sample]:
    """So many continuations of each prompt, as long as the human text that `prompts` hold.

    batch: continuations that are generated at a time, at most; None: see `default_batch`. What a continuation draws is a function of
    seed, prompt_number and number alone; so samples depend on the batch only as far as a device rounds sums otherwise in another one.
    UserError for settings that the model cannot run with.
    """
    tokenizer, setting = generator.tokenizer, {"iterations": iterations, **vars(sampling)}
    order = [(prompt, number) for prompt in prompts for number in range(continuations)]
    length = len(prompts[0].human_ids)
    capacity = len(prompts[0].prompt_ids) + length
    batch = batch or default_batch(generator, iterations, sampling, capacity)
    batch = math.ceil(len(order) / math.ceil(len(order) / batch))  # as few batches, of one size
    try:
        decoder = Decoder(generator.model, generator.noise, iterations, sampling, batch, capacity)
    except ValueError as error:
        raise UserError(f"{name} cannot generate with {setting_label(setting)} ({error}): change that setting") from None
    samples = []
    with tqdm(total=len(order), desc=f"{name}: {setting_label(setting)}", unit="text", disable=None) as progress:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            rows = part + part[-1:] * (batch - len(part))  # a decoder's batch has one size; the last one is filled up
            seeds = [random.Random(f"{seed}/samples/{prompt.prompt_number}/{number}").getrandbits(62) for prompt, number in rows]
            decoder.truncate(0)
            steps = decoder.generate(torch.tensor([prompt.prompt_ids for prompt, _ in rows]), seeds, length, tokenizer.eos_id)
            tokens = torch.stack(list(steps), dim=1).tolist()
            used = torch.stack(decoder.iterations_used, dim=1).tolist() if decoder.iterations_used else [[]] * batch
            for (prompt, number), written, iterations_used in zip(part, tokens, used):
                ended = tokenizer.eos_id in written
                written = written[: written.index(tokenizer.eos_id)] if ended else written
                continuation = texts_of(tokenizer, prompt.prompt_ids, written)[1]
                samples.append(
                    replace(prompt, model=name, setting=setting, number=number, continuation=continuation, continuation_ids=written,
                            ended=ended, iterations_used=iterations_used[: len(written)])
                )
            progress.update(len(part))
    return samples


def default_batch(generator: TextGenerator, iterations: int, sampling: Sampling, capacity: int) -> int:
    """Continuations at a time: 32 on CPU; on CUDA as many as have a cache in a third of the device's memory, at most 1024."""
    device = generator.model.embedding.weight.device
    if device.type != "cuda":
        return 32
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(1024, memory // 3 // cache_bytes(generator.model, iterations, sampling, capacity)))


def iterations_used(samples: Sequence[Sample]) -> dict | None:
    """Iterations a token of continuations took: their mean, and how many tokens took so many; None where no sample says so."""
    counts = Counter(used for sample in samples for used in sample.iterations_used)
    if not counts:
        return None
    mean = sum(used * count for used, count in counts.items()) / counts.total()
    return {"mean": mean, "histogram": {str(used): counts[used] for used in sorted(counts)}}


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object a line. UserError when the disk refuses."""
    write_atomically(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def read_samples(paths: Sequence[Path]) -> list[list[Sample]]:
    """The samples of files, those of each (model, setting) together in the order of the files. UserError for anything else."""
    names = {field.name for field in fields(Sample)}
    groups: dict[str, list[Sample]] = {}
    for path in paths:
        try:
            # split("\n"), as text may hold other characters that end lines
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line:
                    tree = json.loads(line)
                    sample = Sample(**{name: tree[name] for name in names if name in tree})
                    groups.setdefault(json.dumps([sample.model, sample.setting]), []).append(sample)
        except OSError as error:
            raise UserError(f"samples file {path} cannot be read ({error.strerror}): correct the path") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a samples file of rdtrain evaluate: give a samples-*.jsonl that it wrote") from None
    if not groups:
        raise UserError(f"{', '.join(map(str, paths))} holds no samples: give a samples-*.jsonl that rdtrain evaluate wrote")
    return list(groups.values())
