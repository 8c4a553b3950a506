"""Text to token numbers and back, exactly: a SentencePiece model with byte fallback.

This file is copied byte for byte into exported model folders, so it imports nothing but the standard library and sentencepiece.

Notable: `decode(encode(text)) == text` for every string that UTF-8 can hold. Two things are needed for that. The model must not
normalise text and must have a piece for each byte; both are checked on loading. And SentencePiece writes a space as U+2581
inside, so that a U+2581 of the text would come back as a space: such characters are encoded here as their three UTF-8 bytes. Text
is handed to SentencePiece line by line, which gives the same pieces (none crosses a line end) several times as fast and in
bounded memory.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
SEPARATOR = re.compile(f"(\n|{SPACE_MARK})")
PROBES = ("  two  spaces ", "\ttab\r\n\n", "\0\x1f\x85\u2028", "\ufb01 e\u0301 \u212b \uff11 \u3000", "\U0001f600")


class Tokenizer:
    """A trained tokenizer.

    Attributes: vocab_size (ids are 0 .. vocab_size - 1), bos_id and eos_id (the marks before and after a document), file (the
    model file) and hash (its SHA-256 in hex: two tokenizers are the same if and only if their hashes are).
    """

    def __init__(self, path: str | Path):
        """Loads `path`, a SentencePiece model file or a folder that holds one as tokenizer.model.

        Raises FileNotFoundError when there is none, and ValueError when it is not a SentencePiece model, or one that cannot give
        back every text or has no marks for the ends of a document. Each message is one sentence.
        """
        path = Path(path)
        self.file = path / "tokenizer.model" if path.is_dir() else path
        if not self.file.is_file():
            raise FileNotFoundError(f"no tokenizer at {self.file}; give a SentencePiece model or a folder with tokenizer.model")
        content = self.file.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(content)
        except RuntimeError:
            raise ValueError(f"{self.file} is not a SentencePiece model, or is damaged; give a whole one") from None
        self.hash = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self._separator_ids = {"\n": self._processor.encode("\n"),
                               SPACE_MARK: [self._byte_id(byte) for byte in SPACE_MARK.encode()]}
        self._check_model()

    def _byte_id(self, byte: int) -> int:
        return self._processor.piece_to_id(f"<0x{byte:02X}>")

    def _check_model(self) -> None:
        processor = self._processor
        if not all(processor.is_byte(self._byte_id(byte)) for byte in range(256)):
            raise ValueError(f"{self.file} has no pieces for single bytes, so it loses some text; train it with byte_fallback")
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{self.file} has no pieces that mark the ends of a document; train it with a bos_id and an eos_id")
        if any("\n" in processor.id_to_piece(token) and processor.id_to_piece(token) != "\n" for token in range(self.vocab_size)):
            raise ValueError(f"{self.file} has pieces that cross a line end; train it without such user-defined symbols")
        if any(processor.normalize(text) != text.replace(" ", SPACE_MARK) or self.decode(self.encode(text)) != text
               for text in PROBES):
            raise ValueError(f"{self.file} changes text before encoding it; train it with the normalization rule identity, "
                             "add_dummy_prefix off and remove_extra_whitespaces off")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with bos_id before and eos_id after when asked. ValueError when the text holds a lone surrogate."""
        return [self.bos_id] * bos + self.encode_batch([text])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text, without marks, computed by so many threads. ValueError when a text holds a lone surrogate."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, which "
                                 "UTF-8 cannot hold; remove it") from None
        cut = [SEPARATOR.split(text) for text in texts]  # for each text: line, separator, line, separator, ..., line
        lines = iter(self._processor.encode([line for parts in cut for line in parts[::2]], num_threads=threads))
        batch = []
        for parts in cut:
            ids = next(lines)
            for separator in parts[1::2]:
                ids += self._separator_ids[separator]
                ids += next(lines)
            batch.append(ids)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Document marks give nothing, bytes that are no UTF-8 U+FFFD. ValueError for ids out of range."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary of {self.vocab_size}")
        return self._processor.decode(ids)
