"""`Tokenizer` over a SentencePiece model.

Notable: to give every text back the model must not normalise it and must have a piece for each byte. And SentencePiece writes a
space as U+2581 inside, so that a U+2581 of the text would come back as a space: such characters are encoded here as their three UTF-8
bytes. Text is handed to SentencePiece line by line, which gives the same pieces (none crosses a line end) several times as fast and in
bounded memory.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
SEPARATOR = re.compile(f"(\n+|{SPACE_MARK})")


class SentencePieceBackend:
    """Attributes as those of `Tokenizer`, and controls, the ids of the control symbols, which no text becomes and which decode to nothing,
    and processor, SentencePiece's own object."""

    def __init__(self, content: bytes, file: Path):
        """content: of `file`, a SentencePiece model. ValueError, in one sentence, for one that `Tokenizer` cannot work with."""
        self.hash = hashlib.sha256(content).hexdigest()
        self.processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.load_from_serialized_proto(content)
        except RuntimeError:
            raise ValueError(f"{file} is not a SentencePiece model, or is damaged; give a whole one") from None
        self.vocab_size, self.bos_id, self.eos_id = processor.vocab_size(), processor.bos_id(), processor.eos_id()
        if not all(processor.is_byte(self._byte_id(byte)) for byte in range(256)):
            raise ValueError(f"{file} has no pieces for single bytes, so it loses some text; train it with byte_fallback")
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{file} has no pieces that mark the ends of a document; train it with a bos_id and an eos_id")
        self.controls = frozenset(filter(processor.is_control, range(self.vocab_size)))
        of_line_ends = [piece for piece in map(self.name, range(self.vocab_size)) if "\n" in piece]
        if any(piece.strip("\n") for piece in of_line_ends):
            raise ValueError(f"{file} has pieces that cross a line end; train it without such user-defined symbols")
        self._long_line_ends = any(len(piece) > 1 for piece in of_line_ends)
        self._line_end, self._space_mark = processor.encode("\n"), [self._byte_id(byte) for byte in SPACE_MARK.encode()]

    def _byte_id(self, byte: int) -> int:
        return self.processor.piece_to_id(f"<0x{byte:02X}>")

    def _separator(self, separator: str) -> list[int]:
        if separator == SPACE_MARK:
            return self._space_mark
        return self.processor.encode(separator) if self._long_line_ends else self._line_end * len(separator)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """As `Tokenizer.encode_batch`."""
        cut = [SEPARATOR.split(text) for text in texts]  # for each text: line, separator, line, separator, ..., line
        lines = iter(self.processor.encode([line for parts in cut for line in parts[::2]], num_threads=threads))
        batch = []
        for parts in cut:
            ids = next(lines)
            for separator in parts[1::2]:
                ids += self._separator(separator)
                ids += next(lines)
            batch.append(ids)
        return batch

    def decode(self, ids: list[int]) -> str:
        """As `Tokenizer.decode`."""
        return self.processor.decode(ids)

    def name(self, token: int) -> str:
        """The piece as the model writes it."""
        return self.processor.id_to_piece(token)

    def token_bytes(self, token: int) -> int:
        """The bytes of a piece that is no control symbol."""
        return 1 if self.processor.is_byte(token) else len(self.name(token).replace(SPACE_MARK, " ").encode())
