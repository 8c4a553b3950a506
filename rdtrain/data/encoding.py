"""From one unit of the input to a file of tokens: the part of sharding that takes the time, done by worker processes.

    NUMBER.tokens     the tokens of each document, `<s> ids </s>`, one after the other, in the shards' dtype
    NUMBER.records    for each document a RECORD: the hash of its text, its tokens, its bytes
    NUMBER.json       counts, and where the first document that could not be read stands; written last, so that it means that all is done

Notable: a document is encoded in segments, so that memory depends neither on the length of a document nor on that of a line. Segments
end after a line end or before a space that stands between words, where no piece of SentencePiece's and none of GPT-2's, Llama 3's or
Qwen's reaches across: the tokens are those of the whole text. Only in a stretch of a thousand characters without such a place may they
differ, and the text that they stand for does not.
"""

import functools
import hashlib
import json
import os
import pickle
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..model.tokenizer import Tokenizer
from .output import file_facts
from .reading import End, Piece, Rejected, Unit, read_unit

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
SEGMENT_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 20  # text that is encoded at a time
BOUNDARY_CHARACTERS = 1000  # at the end of a segment, in which a place between words is looked for
BETWEEN_WORDS = re.compile(r"\w(?:\n(?=\w)|(?= \w))")


def unit_file(folder: Path, number: int, ending: str) -> Path:
    """Where one of a unit's files is: a folder holds those of a thousand units."""
    return folder / f"{number // 1000:04}" / f"{number:07}.{ending}"


def content_hash(unit: Unit) -> str | None:
    """A hash of the content that the main process has read; None when the worker reads the file itself."""
    return None if unit.content is None else hashlib.blake2b(pickle.dumps(unit.content), digest_size=16).hexdigest()


def encode_unit(unit: Unit, folder: Path, tokenizer: tuple[Path, str], dtype: str) -> dict:
    """Writes the files of `unit` below `folder` and returns what its .json holds. tokenizer: its file and hash.

    That is: source, file, rows (in the unit), documents, tokens, text_bytes, input_bytes, counts (documents left out, by reason),
    examples (the first of each reason: file, row in the unit, detail), content_hash and checksums (SHA-256). Raises OSError when
    the disk refuses, and UserError when the tokenizer is another one.
    """
    final = {ending: unit_file(folder, unit.number, ending) for ending in ("tokens", "records", "json")}
    written = {ending: file.with_suffix(f".{ending}.{os.getpid()}") for ending, file in final.items()}
    final["json"].parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[str, int, str]] = {}
    rows = 0
    with written["tokens"].open("wb") as stream:
        writer = _TokenWriter(stream, _load_tokenizer(*tokenizer), dtype)
        for event in read_unit(unit):
            if isinstance(event, End):
                rows = event.rows
            elif reason := writer.add(event):
                counts[reason] += event.count if isinstance(event, Rejected) else 1
                examples.setdefault(reason, (event.file, event.row, event.detail if isinstance(event, Rejected) else ""))
        writer.flush()
    records = np.array(writer.records, RECORD)
    written["records"].write_bytes(records.tobytes())
    checksums = {ending: file_facts(written[ending])["sha256"] for ending in ("tokens", "records")}
    facts = {"source": unit.source, "file": unit.files[0], "rows": rows, "documents": len(records),
             "tokens": int(records["tokens"].sum()), "text_bytes": int(records["bytes"].sum()), "input_bytes": unit.input_bytes,
             "counts": counts, "examples": examples, "content_hash": content_hash(unit),
             "checksums": checksums}
    written["json"].write_text(json.dumps(facts))
    for ending, file in final.items():  # the .json last
        os.replace(written[ending], file)
    return facts


@functools.lru_cache(maxsize=1)
def _load_tokenizer(file: Path, expected_hash: str) -> Tokenizer:
    tokenizer = Tokenizer(file)
    if tokenizer.hash != expected_hash:
        raise UserError(f"{file} has changed while it was in use; give the tokenizer that the run began with")
    return tokenizer


def segments(text: str) -> Iterator[str]:
    """The text in segments of at most SEGMENT_CHARACTERS."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        end = _boundary(text, start, start + SEGMENT_CHARACTERS)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _boundary(text: str, start: int, stop: int) -> int:
    """The last place of start + 1 .. stop that no piece reaches across, or `stop` when there is none."""
    last = None
    for last in BETWEEN_WORDS.finditer(text, max(start, stop - BOUNDARY_CHARACTERS), stop):  # noqa: B007  # the last one is wanted
        pass
    if last is not None:
        return last.end()
    if line_end := text.rfind("\n", start, stop) + 1:
        return line_end
    space = text.rfind(" ", start, stop)
    while space > start and text[space - 1] == " ":  # pieces of several spaces exist
        space -= 1
    return space if space > start else stop


class _Document:
    """The document that is being read: `tail` is what has not been cut into segments, `written` the bytes already in the file."""

    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=16)
        self.text_bytes = self.tokens = self.written = 0
        self.visible = False
        self.tail = ""
        self.segments: list[str] = []


class _TokenWriter:
    """Appends documents to a file of tokens. `records` are (high, low, tokens, bytes) of those that are complete."""

    def __init__(self, stream: BinaryIO, tokenizer: Tokenizer, dtype: str):
        self.records: list[tuple[int, int, int, int]] = []
        self._stream = stream
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._hashes: set[bytes] = set()
        self._document = _Document()
        self._batch: list[_Document] = []
        self._characters = 0

    def add(self, event: Piece | Rejected) -> str | None:
        """Takes the next piece, or ends its document without it. Returns the reason why a document was left out."""
        document = self._document
        if isinstance(event, Rejected):
            self._discard()
            return event.reason
        encoded = event.text.encode()
        document.digest.update(encoded)
        document.text_bytes += len(encoded)
        document.visible = document.visible or bool(event.text.strip())
        if not event.last:
            text = document.tail + event.text
            end = _boundary(text, 0, len(text))
            document.tail = text[end:]
            document.segments += segments(text[:end])
            self.flush()
            self._write_segments(document)
            return None
        digest = document.digest.digest()
        if not document.visible or digest in self._hashes:
            self._discard()
            return "duplicate" if document.visible else "empty"
        self._hashes.add(digest)
        document.segments += segments(document.tail + event.text)
        self._batch.append(document)
        self._characters += sum(map(len, document.segments))
        self._document = _Document()
        if self._characters >= BATCH_CHARACTERS or document.written:
            self.flush()
        return None

    def flush(self) -> None:
        """Encodes and writes the complete documents."""
        if self._characters <= 2 * BATCH_CHARACTERS:
            ids = iter(self._tokenizer.encode_batch([text for document in self._batch for text in document.segments]))
        else:  # one long document, a segment at a time
            ids = (self._tokenizer.encode(text) for document in self._batch for text in document.segments)
        for document in self._batch:
            if not document.written:
                self._write(document, [self._tokenizer.bos_id])
            for _ in document.segments:
                self._write(document, next(ids))
            self._write(document, [self._tokenizer.eos_id])
            digest = document.digest.digest()
            high, low = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
            self.records.append((high, low, document.tokens, document.text_bytes))
        self._batch, self._characters = [], 0

    def _write_segments(self, document: _Document) -> None:
        if not document.written:
            self._write(document, [self._tokenizer.bos_id])
        for text in document.segments:
            self._write(document, self._tokenizer.encode(text))
        document.segments = []

    def _write(self, document: _Document, ids: list[int]) -> None:
        document.tokens += len(ids)
        numbers = np.frombuffer(array("I", ids), np.uintc)  # a third of the time that array("H") and numpy take to read a list
        document.written += self._stream.write(numbers.astype(self._dtype, copy=False).tobytes())

    def _discard(self) -> None:
        """Takes back what the current document has written."""
        if self._document.written:
            self._stream.seek(-self._document.written, os.SEEK_END)
            self._stream.truncate()
        self._document = _Document()
