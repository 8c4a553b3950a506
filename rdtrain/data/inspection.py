"""What shards hold, for people: sources, what was left out, lengths of documents with a histogram, and any window as text."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..errors import UserError
from ..model.tokenizer import Tokenizer
from .shards import ShardReader

BINS = 60
BLOCK_DOCUMENTS = 1 << 20


def inspect_shards(folder: str | Path, start: int = 0, document: int | None = None, length: int = 200,
                   histogram: Path | None = None) -> str:
    """A report on shards, with the window of `length` tokens from token `start`, or from the `document`-th document, on.

    folder: or a zip file, or a URL. histogram: a PNG file to draw the documents' lengths to.
    Raises UserError for places out of range and damaged shards.
    """
    reader = ShardReader(folder)
    if document is not None:
        if not 0 <= document < reader.document_count:
            raise UserError(f"there is no document {document} in {folder}; give 0 to {reader.document_count - 1}")
        start = int(reader.document_starts(document, document + 1)[0])
    if not 0 <= start < len(reader) or length < 0:
        raise UserError(f"there are no {length} tokens from {start} on in {folder}; give a start of 0 to {len(reader) - 1}")
    lines = [f"{folder}: {len(reader):,} tokens of {reader.document_count:,} documents, {reader.bytes_per_token:.2f} bytes a token, "
             f"tokenizer {reader.manifest['tokenizer_hash'][:12]} of {reader.vocab_size:,} pieces", ""]
    lines += [*_sources(reader), "", *_lengths(reader, histogram)]
    if length:
        stop = min(start + length, len(reader))
        lines += ["", f"tokens {start:,} to {stop - 1:,}:", "", _text(reader, start, stop)]
    return "\n".join(lines)


def _sources(reader: ShardReader) -> list[str]:
    if reader.manifest["format_version"] == 1:
        return [f"{len(reader.manifest['sources'])} input files (shards of format 1 name no sources)"]
    rows = [("source", "documents", "tokens", "share", "bytes a token", "left out")]
    for source in reader.manifest["sources"]:
        left_out = ", ".join(f"{facts['documents']:,} {reason}" for reason, facts in source["left_out"].items()) or "nothing"
        rows.append((source["name"], f"{source['documents']:,}", f"{source['tokens']:,}", f"{source['tokens'] / len(reader):.1%}",
                     f"{source['text_bytes'] / max(source['tokens'], 1):.2f}", left_out))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) if index in (0, 5) else cell.rjust(width)
                      for index, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def _lengths(reader: ShardReader, histogram: Path | None) -> list[str]:
    """Quantiles of the lengths, exact up to a bin of the histogram, which needs no array of the size of the corpus."""
    longest = shortest = None
    edges = np.geomspace(2, max(len(reader), 3), 2000)  # a document has its two marks at least
    counts = np.zeros(len(edges) - 1, np.int64)
    for first in range(0, reader.document_count, BLOCK_DOCUMENTS):
        lengths = np.diff(reader.document_starts(first, min(first + BLOCK_DOCUMENTS, reader.document_count) + 1))
        counts += np.histogram(np.clip(lengths, edges[0], edges[-1]), edges)[0]
        longest = max(int(lengths.max()), longest or 0)
        shortest = min(int(lengths.min()), shortest or len(reader))
    quantiles = [edges[np.searchsorted(np.cumsum(counts), share * counts.sum())] for share in (0.1, 0.5, 0.9)]
    if histogram is not None:
        _draw(edges, counts, histogram)
    low, middle, high = (f"{quantile:,.0f}" for quantile in quantiles)
    average = len(reader) / reader.document_count
    return [f"tokens of a document: {shortest:,} at least, {longest:,} at most, {average:,.0f} on average; a tenth below about {low}, "
            f"half below {middle}, nine tenths below {high}"]


def _draw(edges: np.ndarray, counts: np.ndarray, file: Path) -> None:
    from matplotlib.figure import Figure

    if file.suffix.lower() != ".png":
        raise UserError(f"{file} is no PNG file; give a name that ends in .png")
    used = np.flatnonzero(counts)
    bins = np.geomspace(edges[used[0]], edges[used[-1] + 1], BINS + 1)
    middles = np.sqrt(edges[:-1] * edges[1:])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for weights, label in ((counts / counts.sum(), "of the documents"), (counts * middles / (counts * middles).sum(), "of the tokens")):
        axes.stairs(np.histogram(middles, bins, weights=weights)[0], bins, label=label)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="share")
    axes.legend()
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); make room there or choose another file") from error


def _text(reader: ShardReader, start: int, stop: int) -> str:
    """The window's text, with the marks of documents written out."""
    with TemporaryDirectory() as folder:
        reader.copy_tokenizer(Path(folder))
        tokenizer = Tokenizer(folder)
    tokens = reader.read(start, stop)
    name = tokenizer.backend.name
    marks = {tokenizer.bos_id: name(tokenizer.bos_id), tokenizer.eos_id: name(tokenizer.eos_id) + "\n"}
    pieces, first = [], 0
    for place in [*np.flatnonzero(np.isin(tokens, list(marks))).tolist(), len(tokens)]:
        pieces.append(tokenizer.decode(tokens[first:place].tolist()))
        pieces.append(marks[int(tokens[place])] if place < len(tokens) else "")
        first = place + 1
    return "".join(pieces)
