"""What `rdtrain shard` reads: named sources, and how their files are cut into units of work.

A source is files, folders and patterns, standard input, or a data set that Hugging Face's `datasets` streams; a YAML file names several:

    sources:
      web: {paths: [data/web/*.jsonl.zst]}
      code: {paths: [data/code, more/code.parquet], column: content}
      wiki: {dataset: wikimedia/wikipedia, config: 20231101.en, split: train}
      piped: {paths: ["-"], standard_input: lines}

Notable: units depend on the input alone, not on who works on them, and come in its order, one after the other as they are asked for.
Worker processes open files for themselves wherever a file can be entered in its middle; packed lines of more than a unit, standard
input and data sets are read by the main process, which hands their text over.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import yaml

from ..errors import UserError
from ..yaml_loader import YamlLoader
from .reading import BYTE_ORDER_MARK, LONGEST_LINE, PACKED, Unit, reason_of, unpack
from .sources import list_files, unit_kind

STANDARD_INPUT = "-"
UNIT_FILES = 1000  # text files in a unit, however small they are


@dataclass(frozen=True)
class NamedSource:
    """One source of documents.

    name; paths: files, folders and patterns as `rdtrain.data.sources.list_files` takes them, or "-" for standard input; dataset: instead
    of paths a name on the Hugging Face hub or a local folder; config and split: which part of the data set.
    column: the text's name in JSON, Parquet and data sets; standard_input: "jsonl", or "lines" for text with a document a line.
    """

    name: str
    paths: tuple[str, ...] = ()
    column: str = "text"
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    standard_input: str = "jsonl"

    def __post_init__(self):
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError(f"source {self.name!r} needs either paths or a dataset: give one of the two")
        if self.standard_input not in ("jsonl", "lines"):
            raise ValueError(f"standard_input of source {self.name!r} is {self.standard_input!r}: make it jsonl or lines")


def load_sources(file: Path) -> list[NamedSource]:
    """The sources that a YAML file names, in its order. UserError when it is no such file."""
    example = "write `sources: {NAME: {paths: [...]}}`, or dataset instead of paths"
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); correct the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets a date that cannot be through as a ValueError
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())}); {example}") from None
    if not isinstance(tree, dict) or list(tree) != ["sources"] or not isinstance(tree["sources"], dict) or not tree["sources"]:
        raise UserError(f"{file} holds no sources; {example}")
    known = {field.name for field in fields(NamedSource)} - {"name"}
    sources = []
    for name, values in tree["sources"].items():
        if not isinstance(values, dict) or (unknown := values.keys() - known):
            wrong = f"has unknown settings ({', '.join(sorted(map(str, unknown)))})" if isinstance(values, dict) else "has no settings"
            raise UserError(f"source {name!r} of {file} {wrong}; there are: {', '.join(sorted(known))}")
        paths = values.get("paths", [])
        texts = {key: value for key, value in values.items() if key != "paths"}
        if not isinstance(paths, list) or not all(isinstance(value, str) for value in [*paths, *texts.values()]):
            raise UserError(f"source {name!r} of {file} needs a list of texts for paths, and a text for everything else; {example}")
        try:
            sources.append(NamedSource(str(name), tuple(paths), **texts))
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
    return sources


class Inputs:
    """The files behind some sources, listed once.

    Attributes: sources, and bytes: the size of all files, or None when standard input or a data set is among them.
    """

    def __init__(self, sources: list[NamedSource], unit_bytes: int, output: Path | None = None):
        """unit_bytes: about how much one unit holds. output: a folder whose files are no input, wherever it lies. Raises the UserErrors of
        `list_files`."""
        self.sources = sources
        self._unit_bytes = unit_bytes
        self._files: list[list[Path | str]] = []
        names = [source.name for source in sources]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two sources are named {repeated!r}; give each a name of its own")
        if [path for source in sources for path in source.paths].count(STANDARD_INPUT) > 1:
            raise UserError("standard input (-) is named twice, and it can be read once only; name it once")
        if self.has_standard_input and sys.stdin is None:
            raise UserError("standard input is closed; pipe text into this command, or give files instead of -")
        for source in sources:
            files = []
            for path in source.paths:
                files += [path] if path == STANDARD_INPUT else list_files([path])
            own = output and output.absolute()
            self._files.append([file for file in dict.fromkeys(files) if file == STANDARD_INPUT or own not in file.absolute().parents])
        self._facts = [[(str(file), *_size_and_time(file)) for file in files] for files in self._files]
        whole = not self.has_standard_input and all(source.dataset is None for source in sources)
        self.bytes = sum(size for facts in self._facts for _, size, _ in facts) if whole else None

    @property
    def has_standard_input(self) -> bool:
        """Whether standard input is read."""
        return any(STANDARD_INPUT in source.paths for source in self.sources)

    def describe(self) -> list[dict]:
        """What decides the documents: for each source its settings and a hash of its files' names and sizes. The same on every node."""
        return [
            {"name": source.name, "column": source.column, "dataset": source.dataset, "config": source.config, "split": source.split,
             "files": len(facts), "bytes": sum(size for _, size, _ in facts),
             "listing": hashlib.sha256(repr([(name, size) for name, size, _ in facts]).encode()).hexdigest()}
            for source, facts in zip(self.sources, self._facts)
        ]

    def times(self) -> str:
        """A hash of when the files were last changed."""
        return hashlib.sha256(repr([[time for _, _, time in facts] for facts in self._facts]).encode()).hexdigest()

    def older_than(self, file: Path) -> bool:
        """Whether all files were last changed before `file` was; False for standard input and data sets, of which nobody knows."""
        return self.bytes is not None and max((time for facts in self._facts for _, _, time in facts), default=0) < file.stat().st_mtime_ns

    def units(self) -> Iterator[Unit]:
        """The units in their order. UserError when a data set or standard input cannot be read."""
        number = 0
        for index, source in enumerate(self.sources):
            for parts in self._rows(source) if source.dataset is not None else self._parts(index, source):
                yield Unit(number, index, column=source.column, **parts)
                number += 1

    def _parts(self, index: int, source: NamedSource) -> Iterator[dict]:
        texts, size = [], 0
        for file, (name, file_bytes, _) in zip(self._files[index], self._facts[index]):
            kind = source.standard_input if file == STANDARD_INPUT else unit_kind(file)
            if texts and (kind != "text" or size >= self._unit_bytes or len(texts) == UNIT_FILES):
                yield {"kind": "text", "files": tuple(texts), "input_bytes": size}
                texts, size = [], 0
            whole = {"kind": kind, "files": (name,), "input_bytes": file_bytes}
            if kind == "text":
                texts.append(name)
                size += file_bytes
            elif kind == "parquet":
                yield from self._parquet(whole)
            elif kind == "json" or file_bytes <= self._unit_bytes and file != STANDARD_INPUT:
                yield whole
            elif file == STANDARD_INPUT:
                yield from self._lines(sys.stdin.buffer, None, {"kind": kind, "files": ("standard input",)})
            elif file.suffix.lower() in PACKED:
                yield from self._packed(whole)
            else:
                for first in range(0, file_bytes, self._unit_bytes):
                    last = min(first + self._unit_bytes, file_bytes)
                    yield {**whole, "first": first, "last": last, "input_bytes": last - first}
        if texts:
            yield {"kind": "text", "files": tuple(texts), "input_bytes": size}

    def _parquet(self, whole: dict) -> Iterator[dict]:
        from pyarrow.parquet import read_metadata

        try:
            metadata = read_metadata(whole["files"][0])
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        except Exception:
            groups = []  # reading it says what is wrong
        if len(groups) < 2:
            yield whole
            return
        first = size = 0
        for last, group in enumerate(groups, 1):
            size += group.total_byte_size
            if size >= self._unit_bytes or last == len(groups):
                share = sum(group.num_rows for group in groups[first:last]) / max(metadata.num_rows, 1)
                yield {**whole, "first": first, "last": last, "input_bytes": int(share * whole["input_bytes"])}
                first, size = last, 0

    def _packed(self, whole: dict) -> Iterator[dict]:
        name = whole["files"][0]
        try:
            with open(name, "rb") as packed, unpack(packed, name) as stream:
                yield from self._lines(stream, packed, {"kind": whole["kind"], "files": whole["files"]})
        except OSError:  # opening it; the worker that tries it again says what is wrong
            yield whole

    def _lines(self, stream: BinaryIO, packed: BinaryIO | None, parts: dict) -> Iterator[dict]:
        """Whole lines of the stream, about a unit's bytes at a time; of a line that is too long, enough to tell that it is."""
        buffer, cut, begun, skipping, fault = bytearray(), 0, 0, False, None
        while True:
            try:
                block = stream.read1(-1)
            except Exception as error:
                if packed is None:
                    raise UserError(f"cannot read standard input ({reason_of(error)}); start the same command again to continue") from error
                block, fault = b"", reason_of(error)
            if skipping and block:
                end = block.find(b"\n") + 1
                block, skipping = block[end:] if end else b"", not end
                if not block:
                    continue
            line_end = block.rfind(b"\n") + 1
            cut = len(buffer) + line_end if line_end else cut
            buffer += block
            if block and cut == 0 and len(buffer) > LONGEST_LINE:
                cut, skipping = LONGEST_LINE + 1, True
                del buffer[cut:]
            if not block or skipping or cut and len(buffer) >= self._unit_bytes:
                content = bytes(buffer[:cut] if block or fault else buffer)  # half a line before damage is part of it
                position = packed.tell() if packed else 0
                if content or fault:
                    yield {**parts, "content": content if begun else content.removeprefix(BYTE_ORDER_MARK), "fault": fault,
                           "input_bytes": position - begun if packed else len(content)}
                del buffer[:len(content)]
                cut, begun = 0, position or begun + len(content)
            if not block:
                return

    def _rows(self, source: NamedSource) -> Iterator[dict]:
        """Rows of a data set, about a unit's bytes of text at a time."""
        parts = {"kind": "rows", "files": (source.dataset,)}
        rows, size = [], 0
        try:
            for row in open_dataset(source):
                rows.append({source.column: row[source.column]} if source.column in row else dict.fromkeys(row))
                value = rows[-1].get(source.column)
                size += len(value) if isinstance(value, str) else 1
                if size >= self._unit_bytes:
                    yield {**parts, "content": rows, "input_bytes": size}
                    rows, size = [], 0
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # whatever the library and the network raise
            raise UserError(f"cannot read the data set {source.dataset} ({reason_of(error)}); start the same command again to continue, or "
                            "correct the name") from error
        if rows:
            yield {**parts, "content": rows, "input_bytes": size}


def open_dataset(source: NamedSource):
    """The rows of a data set of the hub, of a folder of data files, or of a folder that `save_to_disk` wrote, streamed."""
    import datasets

    folder = Path(source.dataset)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(folder)
        if source.split not in splits:
            raise UserError(f"the data set {folder} has no split {source.split!r}; name one of {', '.join(splits)}")
        return splits[source.split].to_iterable_dataset()
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(folder).to_iterable_dataset()
    return datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)


def _size_and_time(file: Path | str) -> tuple[int, int]:
    if file == STANDARD_INPUT:
        return 0, 0
    try:
        status = file.stat()
    except OSError:
        return 0, 0  # reading it says what is wrong
    return status.st_size, status.st_mtime_ns
