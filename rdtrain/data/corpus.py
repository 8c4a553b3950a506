"""A corpus folder: training and validation text as JSON Lines, from installed packages' documentation or from given files.

    train.jsonl, validation.jsonl    one {"source": ..., "text": ...} a line
    corpus.json                      counts, bytes, package versions and the SHA-256 of both files

Notable: the same input gives the same bytes, on any machine and with any number of processes. A document's side is decided by a
hash of its text, so copies of a document stand on one side. Documentation is copied a lot, so paragraphs of the validation text
that stand in the training text too are dropped from the validation text. Memory holds one document and the hashes of the
validation paragraphs.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ..errors import UserError
from .docstrings import package_versions, read_docstrings
from .output import output_folder
from .sources import Document, read_located_documents

FEW_DOCUMENTS = 32  # with fewer, the size of a side would be a matter of luck, so each is cut into pieces
PIECE_CHARACTERS = 8192
LONG_PARAGRAPH = 40  # characters; a shorter one ("Returns:", "See also") says nothing about copying


def write_corpus(output: Path, text: list[Path] | None = None, validation_fraction: float = 0.02, overwrite: bool = False,
                 column: str = "text") -> dict:
    """Writes the corpus folder `output` and returns what its corpus.json holds.

    text: files, folders or patterns as `rdtrain.data.sources.list_files` takes them, column being the text's name in JSON and
    Parquet; None: the docstrings of installed packages. When the files hold fewer than 32 documents, each is cut between
    paragraphs into pieces of about 8,000 characters (fewer in a short text), a document each.
    validation_fraction: the expected share of documents on the validation side, above 0 and at most 0.5; each side gets one at
    least.
    Raises UserError for a fraction out of range, an existing output, sources that cannot be read, text too short or too uniform
    to give a validation side, and a disk that refuses.
    """
    if not 0 < validation_fraction <= 0.5:
        raise UserError(f"a validation fraction of {validation_fraction} is out of range; give one above 0 and at most 0.5")
    with output_folder(output, "corpus.json", overwrite) as folder:
        train, validation, candidates = (folder / f"{name}.jsonl" for name in ("train", "validation", "candidates"))
        if text is None:
            documents = itertools.starmap(Document, read_docstrings())
        else:
            documents = _cut_few(iter(tqdm(read_located_documents(text, column), "corpus", unit=" documents", disable=None)))
        _split(documents, validation_fraction, train, candidates)
        shared = set(_paragraph_hashes(candidates)).intersection(_paragraph_hashes(train)) - {None}
        with validation.open("w", encoding="utf-8") as lines:
            for document in _read(candidates):
                if (rest := _without(shared, document)) is not None:
                    _write(lines, rest)
        candidates.unlink()
        if not validation.stat().st_size:
            raise UserError("every paragraph of the validation text is in the training text too; give more varied text")
        facts = {"train": _facts(train), "validation": _facts(validation), "validation_fraction": validation_fraction,
                 "paragraphs_dropped_from_validation": len(shared), "packages": package_versions() if text is None else {}}
        (folder / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _cut_few(documents: Iterator[Document]) -> Iterator[Document]:
    """The documents, in pieces when they are few."""
    first = list(itertools.islice(documents, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        size = min(PIECE_CHARACTERS, sum(len(document.text) for document in first) // FEW_DOCUMENTS)
        first = [piece for document in first for piece in _pieces(document, size)]
    return itertools.chain(first, documents)


def _pieces(document: Document, size: int) -> Iterator[Document]:
    """Cuts after the first blank line past `size` characters, or after the first line past twice that; nothing is lost."""
    piece, length, number = [], 0, 1
    for line in document.text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= (2 * size if line.strip() else size):
            yield Document(f"{document.source}#{number}", "".join(piece))
            piece, length, number = [], 0, number + 1
    if piece:
        yield Document(f"{document.source}#{number}", "".join(piece))


def _split(documents: Iterator[Document], fraction: float, train: Path, validation: Path) -> None:
    """Writes each document to the side that its hash decides. Of the first few, the lowest hash is always on the validation side
    and the highest always on the training side, so that neither is empty."""
    first = list(itertools.islice(documents, FEW_DOCUMENTS))
    hashes = [_hash(document.text) for document in first]
    if min(hashes) == max(hashes):
        raise UserError("the text is too short to be split into training and validation text; give several different paragraphs")
    bound = min(max(int(fraction * 2**64), min(hashes) + 1), max(hashes))
    with train.open("w", encoding="utf-8") as train_lines, validation.open("w", encoding="utf-8") as validation_lines:
        for document in itertools.chain(first, documents):
            _write(validation_lines if _hash(document.text) < bound else train_lines, document)


def _paragraphs(text: str) -> list[str]:
    """What stands between blank lines, with its indentation."""
    return re.split(r"\n(?:[^\S\n]*\n)+", text.strip("\n"))


def _paragraph_hash(paragraph: str) -> int | None:
    """A hash that indentation and line breaks do not change; None for a short paragraph."""
    plain = " ".join(paragraph.split())
    return _hash(plain) if len(plain) > LONG_PARAGRAPH else None


def _paragraph_hashes(file: Path) -> Iterator[int | None]:
    for document in _read(file):
        yield from map(_paragraph_hash, _paragraphs(document.text))


def _without(shared: set[int | None], document: Document) -> Document | None:
    """The document without the paragraphs in `shared`; None when it loses some and keeps no long one."""
    hashes = [_paragraph_hash(paragraph) for paragraph in _paragraphs(document.text)]
    if shared.isdisjoint(hashes):
        return document
    kept = [(paragraph, key) for paragraph, key in zip(_paragraphs(document.text), hashes) if key not in shared]
    if all(key is None for _, key in kept):
        return None
    return Document(document.source, "\n\n".join(paragraph for paragraph, _ in kept) + "\n")


def _hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _write(lines: TextIO, document: Document) -> None:
    lines.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")


def _read(file: Path) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def _facts(file: Path) -> dict:
    sizes = [len(document.text.encode()) for document in _read(file)]
    with file.open("rb") as content:
        return {"documents": len(sizes), "text_bytes": sum(sizes), "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
