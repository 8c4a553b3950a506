"""Documents out of text, JSON and Parquet files, packed or not, one at a time; the first that cannot be read is an error.

Which files there are is decided here, how they are read in `rdtrain.data.reading`.

Notable:
- Files are read in the order given, those of a folder sorted by path, each once; hidden files and, with a warning, files of unknown
  kinds in a folder are left out.
- Documents without a visible character are left out.
"""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .reading import JSON, PACKED, PARQUET, TEXT, End, Rejected, Unit, holds_one_value, read_unit, rejection_sentence

READABLE = f"{', '.join(TEXT + JSON)} (also followed by {', '.join(PACKED)}) and {', '.join(PARQUET)}"


class Document(NamedTuple):
    """One text and where it stood: the file's path, followed by :row, counted from 1, in a file of many documents."""

    source: str
    text: str


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The readable files that `paths` (files, folders, glob patterns) stand for, each once, in order.

    A warning on standard error counts the files of a folder that are left out because of their ending. Raises UserError for a path or
    pattern that nothing matches, a folder that cannot be read or has no readable file, and a file of an unknown kind that was named itself.
    """
    files: dict[Path, None] = {}  # a set that keeps its order
    for path in map(Path, paths):
        try:
            os.stat(path)
            matches = [path]
        except PermissionError as error:
            raise _unreadable(path, error) from None
        except (OSError, ValueError):  # it is not there, or is no name that a file can have
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if glob.has_magic(str(path)) else []
        if not matches:
            raise UserError(f"no such file or folder: {path}; correct the path")
        for match in matches:
            files.update(dict.fromkeys(_files_of_folder(match) if os.path.isdir(match) else [_named_file(match)]))
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
    for file in files:
        for document in _read_file(file, column):
            if document.text.strip():
                found = True
                yield document
    if not found:
        names = ", ".join(map(str, files[:3])) + (" and others" if len(files) > 3 else "")
        raise UserError(f"no text in {names}; give files that hold some")


def kind_of(file: Path) -> str | None:
    """The ending that says how the file's content is written, or None when no reader is known."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in TEXT + JSON + PARQUET:
        return suffixes[-1]
    return suffixes[0] if len(suffixes) == 2 and suffixes[0] in TEXT + JSON and suffixes[1] in PACKED else None


def _named_file(file: Path) -> Path:
    if kind_of(file) is None:
        raise UserError(f"{file} is of no known kind; give files that end in {READABLE}")
    if os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{file} is a pipe or a device; give files, or - for standard input to rdtrain shard")
    return file


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path} ({error.strerror}); see to its permissions or leave it out")


def _files_of_folder(folder: Path) -> list[Path]:
    """Links are followed, and a folder that several lead to is read once. A link that leads nowhere counts as a file, as one is missed."""

    def refuse(error: OSError):
        raise _unreadable(error.filename, error) from None

    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [name for name, path in real.items() if not (path in seen or seen.add(path))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if kind_of(file) and (os.path.isfile(file) or not os.path.exists(file)))
    if not files:
        raise UserError(f"no readable files in {folder}; readable are {READABLE}")
    if others := sorted(file for file in found if kind_of(file) is None):
        print(f"rdtrain: warning: files of other kinds in {folder} are left out: {len(others)}, the first is {others[0]}", file=sys.stderr)
    return files


def unit_kind(file: Path) -> str:
    """How `rdtrain.data.reading` has to read a file whose kind is known."""
    ending = kind_of(file)
    if ending == ".json":
        return "json" if holds_one_value(str(file)) else "jsonl"
    return "text" if ending in TEXT else ending.removeprefix(".")


def _read_file(file: Path, column: str) -> Iterator[Document]:
    """The file's documents, empty ones too. UserError for the first that cannot be read."""
    pieces = []
    for event in read_unit(Unit(0, 0, unit_kind(file), (str(file),), column)):
        if isinstance(event, Rejected):
            raise UserError(rejection_sentence(event, column))
        if isinstance(event, End):
            return
        pieces.append(event.text)
        if event.last:
            yield Document(f"{file}:{event.row}" if event.row else str(file), "".join(pieces))
            pieces = []
