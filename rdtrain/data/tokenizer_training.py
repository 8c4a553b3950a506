"""Trains a tokenizer: byte-pair encoding or a unigram model by SentencePiece, without any normalisation, each byte a piece of its own.

    tokenizer.model    the SentencePiece model, which is all that `rdtrain.model.tokenizer.Tokenizer` needs
    training.json      what it was trained on, and with what

Notable: training reads a sample of lines, drawn evenly from the whole input with a fixed seed, since neither kind gains anything from
more text, and time and memory grow with it. It runs in one thread, as the sums of a unigram model depend on how many there are: the
same input and SentencePiece version give the same model.
"""

import heapq
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from ..errors import UserError
from ..model.sentencepiece_tokenizer import SPACE_MARK
from ..model.tokenizer import Tokenizer
from .output import output_folder
from .sources import list_files, read_documents

SMALLEST_VOCABULARY = 512  # 256 bytes, three marks, and some pieces
LARGEST_VOCABULARY = 1 << 24
LONGEST_LINE = 1000  # characters; SentencePiece ignores lines longer than 4192 bytes, and a character has at most four
SAMPLE_BYTES = 32 << 20


def train_tokenizer(inputs: list[Path], output: Path, vocab_size: int, overwrite: bool = False, max_bytes: int = SAMPLE_BYTES,
                    column: str = "text", model: str = "bpe", special_tokens: Sequence[str] = (), multiple_of: int = 1) -> Tokenizer:
    """Trains a tokenizer of `vocab_size` pieces on the documents of `inputs` and writes it to the folder `output`.

    inputs: files, folders or patterns as `rdtrain.data.sources.list_files` takes them; column: the text's name in JSON and
    Parquet. model: `bpe` or `unigram` (Kudo 2018, arXiv 1804.10959). multiple_of: the vocabulary is rounded up to a multiple of it, by
    learning as many pieces more.
    special_tokens: names of further marks. They are control symbols, as `<s>` is: only who writes their ids can place them, a text with
    such a name in it is encoded as any other, and they decode to nothing.
    max_bytes: how much text (UTF-8) is learned from at most; all of it is read.
    Ids: 0 unknown (never produced), 1 `<s>`, 2 `</s>`, the special tokens, then the 256 bytes, then learned pieces. Digits are always
    single.
    Raises UserError for a vocabulary that is too small or that the text is too short for, names that cannot be, inputs that cannot be
    read, an existing output, and a disk that refuses.
    """
    if model not in ("bpe", "unigram"):
        raise UserError(f"a tokenizer's model is bpe or unigram, not {model}; choose one of them")
    if multiple_of < 1:
        raise UserError(f"a vocabulary cannot be a multiple of {multiple_of}; give 1 or more")
    vocab_size += -vocab_size % multiple_of
    if not SMALLEST_VOCABULARY + len(special_tokens) <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(f"a vocabulary of {vocab_size} is out of range; ask for {SMALLEST_VOCABULARY + len(special_tokens)} to "
                        f"{LARGEST_VOCABULARY}")
    for number, name in enumerate(special_tokens):
        if not name or re.search(f"[\\s\0{SPACE_MARK}]|^<(unk|s|/s|0x[0-9A-F]{{2}})>$", name) or name in special_tokens[:number]:
            raise UserError(f"{name!r} cannot be a special token, as it is empty, there already, or has a space in it; give another name, "
                            "such as <|user|>")
    files = list_files(inputs)
    with output_folder(output, "training.json", overwrite) as folder:
        lines = sample_lines(read_documents(files, column), max_bytes)
        (folder / "tokenizer.model").write_bytes(_train(lines, vocab_size, model, special_tokens))
        tokenizer = Tokenizer(folder)
        facts = {"vocab_size": vocab_size, "model": model, "special_tokens": tokenizer.special_tokens, "hash": tokenizer.hash,
                 "sentencepiece": sentencepiece.__version__, "learned_from_bytes": sum(len(line.encode()) for line in lines),
                 "inputs": [{"name": file.name, "bytes": file.stat().st_size} for file in files]}
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return Tokenizer(output)


def sample_lines(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Lines of the documents, in their order, of at most `max_bytes` UTF-8 bytes together, each line as likely as any other.

    Long lines are cut. Memory holds the sample only: the lines with the lowest random numbers so far.
    """
    draw = random.Random(0)
    sample: list[tuple[float, int, str]] = []  # a heap with the highest number, negated, on top
    size = 0
    for number, line in enumerate(_lines(documents)):
        heapq.heappush(sample, (-draw.random(), number, line))
        size += len(line.encode())
        while size > max_bytes:
            size -= len(heapq.heappop(sample)[2].encode())
    return [line for _, _, line in sorted(sample, key=lambda item: item[1])]


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in document.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start:start + LONGEST_LINE]


def _train(lines: list[str], vocab_size: int, kind: str, special_tokens: Sequence[str]) -> bytes:
    model = io.BytesIO()
    # In text without spaces SentencePiece would learn no piece for one, and could not give one back.
    needed = {} if any(" " in line for line in lines) else {"required_chars": SPACE_MARK}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab_size, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            control_symbols=list(special_tokens), num_threads=1, minloglevel=2, **needed)
    except RuntimeError as error:
        if limit := re.search(r"too high .* value <= (\d+)", str(error)):
            mend = f"ask for {limit[1]} at most or give more text" if int(limit[1]) >= SMALLEST_VOCABULARY else "give more text"
            raise UserError(f"a vocabulary of {vocab_size} is too large for this text; {mend}") from None
        if need := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(f"a vocabulary of {vocab_size} is too small for this text's characters; ask for more than "
                            f"{need[1]}") from None
        raise
    return model.getvalue()
