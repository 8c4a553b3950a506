"""Documents out of text, JSON and Parquet files, packed or not, one at a time.

Reading, unpacking and streaming are the `datasets` library's. What is done here is to say, in one sentence and with the file's
name, what is wrong with a path, a file, a line or a column.

Notable:
- Files are read in the order given, those of a folder sorted by path, each once; hidden files and files of unknown kinds in a
  folder are left out.
- A text file is one document. Its line ends become "\\n" and a byte order mark at its start is dropped; everything else stays
  exactly as it is, the last line end too. The texts of JSON and Parquet files are kept to the letter.
- JSON Lines are read as lines of text and parsed here, since the library's own reader infers a type for every column from the
  first 10 MB and fails when a column that nobody asked for changes its type later.
- Documents without a visible character are left out.
- Nothing is fetched and nothing stays behind: the library's lock files go to a temporary folder.
"""

import glob
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet
import zstandard
from datasets import IterableDataset

from ..errors import UserError

TEXT = (".txt", ".md", ".rst")
JSON = (".jsonl", ".json")
PARQUET = (".parquet",)
PACKED = (".gz", ".xz", ".zst")  # may follow those of TEXT and JSON
READABLE = f"{', '.join(TEXT + JSON)} (also followed by {', '.join(PACKED)}) and {', '.join(PARQUET)}"


class Document(NamedTuple):
    """One text and where it stood: the file's path, followed by :row, counted from 1, in a file of many documents."""

    source: str
    text: str


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The readable files that `paths` (files, folders, glob patterns) stand for, each once, in order.

    Raises UserError for a path or pattern that nothing matches, a folder without a readable file, a file of an unknown kind and a
    file of zero bytes that was named itself.
    """
    files: dict[Path, None] = {}  # a set that keeps its order
    for path in map(Path, paths):
        if path.exists():
            matches = [path]
        elif glob.has_magic(str(path)):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        else:
            matches = []
        if not matches:
            raise UserError(f"no such file or folder: {path}; correct the path")
        for match in matches:
            files.update(dict.fromkeys(_files_of_folder(match) if match.is_dir() else [_named_file(match)]))
    return list(files)


def read_documents(paths: Iterable[str | Path], column: str = "text") -> Iterator[str]:
    """The texts of `read_located_documents`."""
    return (document.text for document in read_located_documents(paths, column))


def read_located_documents(paths: Iterable[str | Path], column: str = "text") -> Iterator[Document]:
    """The documents of all files that `paths` stand for; `column` names the text in JSON objects and Parquet tables.

    Raises the UserErrors of `list_files`, and one for a binary text file, a damaged file or line, a missing column, a value that
    is not text, and when no file holds a document.
    """
    files = list_files(paths)
    found = False
    with tempfile.TemporaryDirectory(prefix="rdtrain-") as cache:
        for file in files:
            for document in _read_file(file, column, cache):
                if document.text.strip():
                    found = True
                    yield document
    if not found:
        names = ", ".join(map(str, files[:3])) + (" and others" if len(files) > 3 else "")
        raise UserError(f"no text in {names}; give files that hold some")


def _kind(file: Path) -> str | None:
    """The ending that says how the file's content is written, or None when no reader is known."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in TEXT + JSON + PARQUET:
        return suffixes[-1]
    return suffixes[0] if len(suffixes) == 2 and suffixes[0] in TEXT + JSON and suffixes[1] in PACKED else None


def _named_file(file: Path) -> Path:
    if _kind(file) is None:
        raise UserError(f"{file} is of no known kind; give files that end in {READABLE}")
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty; give files that hold text")
    return file


def _files_of_folder(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if _kind(file) and file.is_file() and file.stat().st_size)
    if not files:
        raise UserError(f"no readable files in {folder}; readable are {READABLE}")
    return files


def _read_file(file: Path, column: str, cache: str) -> Iterator[Document]:
    """The file's documents, empty ones too. Whatever the libraries raise while they read it becomes a UserError that names it."""
    kind = _kind(file)
    reader = _read_text if kind in TEXT else _read_parquet if kind in PARQUET else _read_json
    documents = reader(file, column, cache)
    while True:
        try:
            document = next(documents, None)
        except UserError:
            raise
        except UnicodeDecodeError:
            raise UserError(f"{file} is a binary file or not UTF-8; leave it out or convert it to UTF-8") from None
        except Exception as error:  # each packing and each format has exceptions of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"cannot read {file} ({reason}); it may be damaged: replace it or leave it out") from error
        if document is None:
            return
        try:
            document.text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{document.source} has a lone surrogate, which is no character; mend or remove that text") from None
        yield document


def _stream_text(file: Path, sample_by: str, cache: str) -> Iterator[str]:
    """The lines of the file (sample_by "line"), or all of it ("document")."""
    if file.suffix.lower() == ".zst":
        _check_zstandard(file)
    rows = IterableDataset.from_text(_pattern(file), sample_by=sample_by, encoding="utf-8-sig", cache_dir=cache)
    return (row["text"] for row in rows)


def _read_text(file: Path, column: str, cache: str) -> Iterator[Document]:
    for text in _stream_text(file, "document", cache):
        if "\0" in text:
            raise UserError(f"{file} is a binary file (it holds NUL bytes); leave it out or convert it to text")
        yield Document(str(file), text)


def _read_json(file: Path, column: str, cache: str) -> Iterator[Document]:
    """JSON Lines, whatever the ending; a .json file whose first line is no whole object is parsed as one value instead."""
    lines = ((number, line) for number, line in enumerate(_stream_text(file, "line", cache), 1) if line.strip())
    for position, (number, line) in enumerate(lines):
        may_be_one_value = position == 0 and _kind(file) == ".json"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if may_be_one_value:
                yield from _read_json_value(file, column, cache)
                return
            raise UserError(f"line {number} of {file} is not JSON ({error.msg}); mend or remove that line") from None
        if may_be_one_value and isinstance(value, list):
            yield from _read_json_value(file, column, cache)
            return
        yield _document(f"{file}:{number}", value, column)


def _read_json_value(file: Path, column: str, cache: str) -> Iterator[Document]:
    """A file that is one JSON value: a list of objects or of texts, or a single object."""
    try:
        value = json.loads("".join(_stream_text(file, "document", cache)))
    except json.JSONDecodeError as error:
        raise UserError(f"line {error.lineno} of {file} is not JSON ({error.msg}); mend the file") from None
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield _document(f"{file}:{number}", item, column)


def _read_parquet(file: Path, column: str, cache: str) -> Iterator[Document]:
    names = pyarrow.parquet.read_schema(file).names
    if column not in names:
        raise _missing_column(str(file), column, names)
    for number, row in enumerate(IterableDataset.from_parquet(_pattern(file), columns=[column], cache_dir=cache), 1):
        yield _document(f"{file}:{number}", row, column)


def _document(source: str, row: object, column: str) -> Document:
    """The document in one row, a JSON value or a dictionary of one Parquet row; a null counts as an empty text."""
    if isinstance(row, str):  # a JSON list of plain strings
        return Document(source, row)
    if not isinstance(row, dict):
        raise UserError(f"{source} is not an object with a column {column!r}; write one JSON object a line")
    if column not in row:
        raise _missing_column(source, column, list(row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{source} has {type(text).__name__}, not text, in column {column!r}; name the one that holds the text")
    return Document(source, text or "")


def _missing_column(source: str, column: str, columns: list[str]) -> UserError:
    names = ", ".join(columns) or "none"
    return UserError(f"{source} has no column {column!r}; name the one that holds the text (there are: {names})")


def _pattern(file: Path) -> str:
    """The file's path for `datasets`, which takes what it is given for a glob pattern."""
    return glob.escape(str(file.absolute()))


def _check_zstandard(file: Path) -> None:
    """Raises EOFError for a .zst file that was cut off, which reads as a shorter text without any error otherwise."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            while block:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                frame.decompress(block)
                block = frame.unused_data
    if not frame.eof:
        raise EOFError("the packed data end too early")
