"""Text to token numbers and back, exactly: a SentencePiece model with byte fallback, or a byte-level tokenizer of Hugging Face's kind.

This file and the two that it loads, sentencepiece_tokenizer.py and byte_level_tokenizer.py, are copied byte for byte into exported model
folders, so they import nothing but the standard library and the library that does the work.

Notable: `decode(encode(text)) == text` for every string that UTF-8 can hold, and no text becomes a mark or a special token, also not
one that looks like it. A tokenizer that could not keep to that is refused on loading.
"""

import re
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # a SentencePiece model; a tokenizer of the library `tokenizers`
UNUSED = "<|unused_{}|>"  # the name of the n-th piece that only makes the vocabulary larger
IMPORT_MAY_MEND = "see whether `rdtrain tokenizer import` can mend that"
PROBES = ("  two  spaces ", "\ttab\r\n\n", "one\ntwo\n\n\n three", "\0\x1f\x85\u2028", "\ufb01 e\u0301 \u212b \uff11 \u3000", "\U0001f600",
          "\u2581 \u2581\u2581", "I'M  It's 1234567 \u00e9\u4e00\u4e01\u0e01")


def tokenizer_file(path: str | Path) -> Path:
    """The one file that a tokenizer is: `path` itself, or tokenizer.model or tokenizer.json in the folder `path`.

    Raises FileNotFoundError when there is none, and ValueError when a folder has both; each message is one sentence.
    """
    path = Path(path)
    found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()] if path.is_dir() else [path]
    if len(found) > 1:
        raise ValueError(f"{path} holds both {' and '.join(TOKENIZER_FILES)}; give one of the two files")
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; give a SentencePiece model, a tokenizer.json or a folder with one of them")
    return found[0]


class Tokenizer:
    """A tokenizer of either kind.

    Attributes: vocab_size (ids are 0 .. vocab_size - 1), bos_id and eos_id (the marks before and after a document; some tokenizers have
    one for both), special_tokens (the id of each other token that no text becomes and that decodes to nothing, by its name),
    unused_tokens (how many ids at the end only make the vocabulary larger), file, file_name (of TOKENIZER_FILES, what copies are called),
    hash (SHA-256, in hex, of the file, a tokenizer.json taken in the form that `canonical` gives it: two tokenizers are the same if and
    only if their hashes are) and backend (what does the work).
    """

    def __init__(self, path: str | Path):
        """Loads `path`: see `tokenizer_file`. A file whose name ends in .json is of Hugging Face's kind.

        Raises FileNotFoundError when there is none, and ValueError when it is damaged, cannot give back every text or has no marks for the
        ends of a document. Each message is one sentence.
        """
        self.file = tokenizer_file(path)
        content = self.file.read_bytes()
        if self.file.suffix == ".json":
            from .byte_level_tokenizer import ByteLevelBackend as Backend
        else:
            from .sentencepiece_tokenizer import SentencePieceBackend as Backend
        self.file_name = TOKENIZER_FILES[self.file.suffix == ".json"]
        self.backend = backend = Backend(content, self.file)
        self.hash, self.vocab_size, self.bos_id, self.eos_id = backend.hash, backend.vocab_size, backend.bos_id, backend.eos_id
        unused = re.compile(re.escape(UNUSED).replace(r"\{\}", r"\d+"))
        used = self.vocab_size
        while used - 1 in backend.controls and unused.fullmatch(backend.name(used - 1)):
            used -= 1
        self.unused_tokens = self.vocab_size - used
        special = sorted(token for token in backend.controls if token < used and token not in (self.bos_id, self.eos_id))
        self.special_tokens = {backend.name(token): token for token in special}
        probes = [*PROBES, *map(backend.name, backend.controls)]
        for text, ids in zip(probes, self.encode_batch(probes)):
            if self.decode(ids) != text:
                raise ValueError(f"{self.file} changes text before encoding it, {text!r} for example; {IMPORT_MAY_MEND}")

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
        return self.backend.encode_batch(texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Marks and special tokens give nothing, bytes that are no UTF-8 U+FFFD. ValueError for ids out of range."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(ids)

    def token_bytes(self, token: int) -> int:
        """How many bytes of UTF-8 a token of a text stands for; 0 for marks and special tokens."""
        return 0 if token in self.backend.controls else self.backend.token_bytes(token)
