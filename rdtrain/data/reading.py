"""Documents out of one unit of work, a piece of the input: whatever cannot be read is named and counted, and the rest is read.

A unit is some text files, some lines of a JSON Lines file, some row groups of a Parquet file, or rows that are at hand already.
`read_unit` gives its documents in their order as pieces of text, and a `Rejected` in the place of each document that is none.

Notable:
- A text file is one document of any length, read in pieces. Its line ends become "\\n" and a byte order mark at its start is dropped;
  everything else stays exactly as it is, the last line end too. The texts of JSON and Parquet files are kept to the letter.
- JSON Lines are split at "\\n" only and parsed one by one, so that a bad line costs nothing but itself, and nobody minds what is in
  the other columns.
- Packed data that end too early are an error in all three packings, after everything before has been read.
- Worker processes import this, so it imports little.
"""

import gzip
import io
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

TEXT = (".txt", ".md", ".rst")
JSON = (".jsonl", ".json")
PARQUET = (".parquet",)
PACKED = (".gz", ".xz", ".zst")  # may follow those of TEXT and JSON
LONGEST_LINE = 128 << 20  # bytes of a line of JSON; a longer one is left out, so that memory is bounded
PIECE_CHARACTERS = 1 << 20  # of a text file, read at a time
READ_BYTES = 1 << 16  # of packed data, unpacked, at a time
LONGEST_WINDOW = 1 << 31  # of a .zst file, in bytes, as `zstd --long=31` writes it; unpacking takes as much memory at most
PACKED_READ = 1 << 14  # bytes of zstandard data unpacked at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unit:
    """A piece of the input.

    number: its place in the order of the whole input, from 0; source: the number of the named source that it belongs to.
    kind: "text" (files that are a document each), "lines" (text, a document a line), "jsonl", "json" (one value), "parquet" or
    "rows" (JSON values in `content`).
    files: the names of what is read, more than one only for "text"; column: the text's name in JSON and Parquet.
    first, last: of "jsonl" the lines that begin at bytes first .. last - 1 (last None: to the end), of "parquet" the row groups.
    content: bytes or rows that have been read already, to be taken instead of the file's; fault: why no more could be read after it.
    input_bytes: how much of the input this is, for showing progress.
    """

    number: int
    source: int
    kind: str
    files: tuple[str, ...]
    column: str = "text"
    first: int = 0
    last: int | None = None
    content: bytes | list | None = None
    fault: str | None = None
    input_bytes: int = 0


class Piece(NamedTuple):
    """The next part of a document, and whether it is the last; row counts from 1 in the unit and is 0 for a file of one document."""

    file: str
    row: int
    text: str
    last: bool


class Rejected(NamedTuple):
    """`count` documents from `row` on that cannot be read; after some pieces of a document, the rest of that one.

    reason: a key of REASONS; detail: what is peculiar to this case.
    """

    file: str
    row: int
    reason: str
    detail: str = ""
    count: int = 1


class End(NamedTuple):
    """What comes last: the rows or lines in the unit, whether they held a document or not."""

    rows: int


REASONS = {  # what is wrong, and the mend
    "not UTF-8": "{file} is a binary file or not UTF-8; leave it out or convert it to UTF-8",
    "binary": "{file} is a binary file (it holds NUL bytes); leave it out or convert it to text",
    "unreadable": "cannot read {file} ({detail}); it may be damaged: replace it or leave it out",
    "not JSON": "line {row} of {file} is not JSON ({detail}); mend or remove that line",
    "too long": "line {row} of {file} is too long to be read ({detail}); cut it",
    "not an object": "{place} is not an object with a column {column!r}; write one JSON object a line",
    "no column": "{place} has no column {column!r}; name the one that holds the text (there are: {detail})",
    "not text": "{place} has {detail}, not text, in column {column!r}; name the one that holds the text",
    "lone surrogate": "{place} has a lone surrogate, which is no character; mend or remove that text",
}


def rejection_sentence(rejected: Rejected, column: str) -> str:
    """One sentence: what is wrong, where, and the mend."""
    place = f"{rejected.file}:{rejected.row}" if rejected.row else rejected.file
    return REASONS[rejected.reason].format(**rejected._asdict(), place=place, column=column)


def read_unit(unit: Unit) -> Iterator[Piece | Rejected | End]:
    """The documents of `unit`, empty ones too, and an End. Raises nothing, whatever the files hold."""
    if unit.kind == "text":
        for file in unit.files:
            yield from _read_text(file)
        yield End(0)
        return
    rows, file = 0, unit.files[0]
    try:
        for event in _READERS[unit.kind](unit):
            if isinstance(event, End):
                rows = event.rows
            else:
                rows = event.row
                yield event
    except Exception as error:  # each packing and each format has exceptions of its own
        yield Rejected(file, rows + 1, "unreadable", reason_of(error))
    if unit.fault is not None:
        yield Rejected(file, rows + 1, "unreadable", unit.fault)
    yield End(rows)


@contextmanager
def open_stream(file: str | Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. Reading raises EOFError, or the packing's own exception, when packed data are damaged."""
    with open(file, "rb", buffering=1 << 18) as packed, unpack(packed, file) as stream:
        yield stream


def unpack(packed: BinaryIO, file: str | Path) -> BinaryIO:
    """The stream that `packed` holds, as the ending of the file's name says; `packed` itself when it is of no packing. EOFError when it
    is packed and holds nothing at all, which gzip would take for no text."""
    packing = Path(file).suffix.lower()
    if packing not in PACKED:
        return packed
    if not packed.peek(1):
        raise EOFError("the file is empty")
    stream = {".gz": lambda: gzip.GzipFile(fileobj=packed), ".xz": lambda: lzma.LZMAFile(packed), ".zst": lambda: _ZstandardStream(packed)}
    return io.BufferedReader(_Blocks(stream[packing]()), READ_BYTES)


def holds_one_value(file: str) -> bool:
    """Whether a .json file is one JSON value, not JSON Lines: its first line is no whole object. False when it cannot be read."""
    try:
        with open_stream(file) as stream:
            for line in iter(lambda: stream.readline(LONGEST_LINE), b""):
                if line := line.removeprefix(BYTE_ORDER_MARK).strip():
                    return isinstance(json.loads(line.decode()), list)
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError, zstandard.ZstdError):
        return False  # reading it as lines says what is wrong
    except (ValueError, RecursionError):
        return True
    return False


def reason_of(error: Exception) -> str:
    """What an exception says, in one line without a full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class _Blocks(io.RawIOBase):
    """Reads at most READ_BYTES at a time, whoever reads: where damaged packed data end, in bytes unpacked, depends on it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._stream.read1(min(len(buffer), READ_BYTES))
        buffer[:len(block)] = block
        return len(block)


class _ZstandardStream:
    """Unpacks a .zst file of any number of frames; EOFError when the last one is cut off, which the library itself takes for the end."""

    def __init__(self, packed: BinaryIO):
        self._file = packed
        self._frame = self._new_frame()
        self._packed = self._unpacked = b""

    def read1(self, size: int) -> bytes:
        while not self._unpacked:
            if not self._packed and not (block := self._file.read(PACKED_READ)):
                if not self._frame.eof:
                    raise EOFError("the packed data end too early")
                return b""
            block = self._packed or block
            if self._frame.eof:
                self._frame = self._new_frame()
            self._unpacked = memoryview(self._frame.decompress(block))
            self._packed = self._frame.unused_data
        block, self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return block

    def _new_frame(self):
        return zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()


def _read_text(file: str) -> Iterator[Piece | Rejected]:
    try:
        with open_stream(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as characters:
            piece = characters.read(PIECE_CHARACTERS)
            while "\0" not in piece:
                following = characters.read(PIECE_CHARACTERS)
                yield Piece(file, 0, piece, not following)
                if not following:
                    return
                piece = following
        yield Rejected(file, 0, "binary")
    except UnicodeDecodeError:
        yield Rejected(file, 0, "not UTF-8")
    except Exception as error:
        yield Rejected(file, 0, "unreadable", reason_of(error))


def _lines(unit: Unit) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of the lines that begin in the unit; None for a line that is too long."""
    with open_stream(unit.files[0]) if unit.content is None else io.BytesIO(unit.content) as stream:
        position = number = 0
        if unit.first:
            stream.seek(unit.first - 1)  # a line that begins at `first` follows a line end
            position = unit.first - 1 + _skip_line(stream)
        while (unit.last is None or position < unit.last) and (line := stream.readline(LONGEST_LINE + 1)):
            position += len(line)
            number += 1
            if len(line) > LONGEST_LINE:
                position += 0 if line.endswith(b"\n") else _skip_line(stream)
                yield number, None
            else:
                yield number, line.removeprefix(BYTE_ORDER_MARK) if position == len(line) else line


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the next line end and returns how many bytes that were."""
    skipped = 0
    while part := stream.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _read_lines(unit: Unit) -> Iterator[Piece | Rejected | End]:
    """Lines of JSON or, for the kind "lines", of text."""
    file, number = unit.files[0], 0
    for number, line in _lines(unit):
        if line is None:
            yield Rejected(file, number, "too long", f"over {LONGEST_LINE >> 20} MiB")
            continue
        try:
            if unit.kind == "lines":
                yield Piece(file, number, line.removesuffix(b"\n").removesuffix(b"\r").decode(), True)
            elif line := line.strip():
                yield _document(file, number, json.loads(line.decode()), unit.column)
        except UnicodeDecodeError:
            yield Rejected(file, number, "not UTF-8")
        except RecursionError:
            yield Rejected(file, number, "not JSON", "it is nested too deeply")
        except ValueError as error:
            yield Rejected(file, number, "not JSON", getattr(error, "msg", reason_of(error)))
    if number == 0 and unit.first == 0 and unit.content is None:
        yield Piece(file, 0, "", True)  # a file without a line counts as an empty document
    yield End(number)


def _read_json_value(unit: Unit) -> Iterator[Piece | Rejected | End]:
    """A file that is one JSON value, which is parsed at once: a list of objects or of texts, or a single object."""
    file = unit.files[0]
    with open_stream(file) as stream:
        content = stream.read()
    try:
        value = json.loads(content.removeprefix(BYTE_ORDER_MARK).decode())
    except UnicodeDecodeError:
        yield Rejected(file, 0, "not UTF-8")
    except RecursionError:
        yield Rejected(file, 1, "not JSON", "it is nested too deeply")
    except ValueError as error:
        yield Rejected(file, getattr(error, "lineno", 1), "not JSON", getattr(error, "msg", reason_of(error)))
    else:
        for number, item in enumerate(value if isinstance(value, list) else [value], 1):
            yield _document(file, number, item, unit.column)


def _read_rows(unit: Unit) -> Iterator[Piece | Rejected]:
    for number, row in enumerate(unit.content, 1):
        yield _document(unit.files[0], number, row, unit.column)


def _read_parquet(unit: Unit) -> Iterator[Piece | Rejected | End]:
    from pyarrow.parquet import ParquetFile  # takes a while, and most units are of other kinds

    file, rows = unit.files[0], 0
    with ParquetFile(file) as table:
        names = table.schema_arrow.names
        last = table.num_row_groups if unit.last is None else unit.last
        sizes = [table.metadata.row_group(group).num_rows for group in range(unit.first, last)]
        if unit.column not in names:
            yield Rejected(file, 0, "no column", ", ".join(names) or "none", sum(sizes))
            sizes = []
        for group, size in enumerate(sizes, unit.first):
            row, rows = rows, rows + size
            try:
                for batch in table.iter_batches(256, row_groups=[group], columns=[unit.column]):
                    for scalar in batch.column(0):
                        row += 1
                        try:
                            yield _document(file, row, {unit.column: scalar.as_py()}, unit.column)
                        except UnicodeDecodeError:
                            yield Rejected(file, row, "not UTF-8")
            except Exception as error:
                yield Rejected(file, row + 1, "unreadable", reason_of(error), rows - row)
    yield End(rows)


_READERS = {"lines": _read_lines, "jsonl": _read_lines, "json": _read_json_value, "rows": _read_rows, "parquet": _read_parquet}


def _document(file: str, row: int, value: object, column: str) -> Piece | Rejected:
    """The document in one row, a JSON value or a dictionary of one table's row; a null counts as an empty text."""
    if isinstance(value, dict):
        if column not in value:
            return Rejected(file, row, "no column", ", ".join(value) or "none")
        value = "" if value[column] is None else value[column]
        if not isinstance(value, str):
            return Rejected(file, row, "not text", type(value).__name__)
    elif not isinstance(value, str):  # a string is one of a JSON list of plain strings
        return Rejected(file, row, "not an object")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Rejected(file, row, "lone surrogate")
    return Piece(file, row, value, True)
