"""A SentencePiece tokenizer of an exported model for Hugging Face transformers: tokenizer.py behind transformers' interface.

`AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)` loads it. Its ids and its text are those of `Tokenizer`, whatever the
text. It is of transformers' slow kind, whose work SentencePiece does, because the `tokenizers` library decodes bytes otherwise: of
several in a row of which some are no UTF-8 it shows none, where SentencePiece shows those that are. A byte-level tokenizer needs no class
of ours: transformers reads tokenizer.json.
"""

import re
import shutil
from pathlib import Path

import transformers

from .exceptions import refusal_of_transformers

if refused := refusal_of_transformers(transformers.__version__, "tokenizer"):
    raise ImportError(refused)

from transformers import PreTrainedTokenizer

from .tokenizer import Tokenizer

# As in configuration_rdtrain.py.
_FILES = """
from .byte_level_tokenizer import
from .sentencepiece_tokenizer import
"""


class RecurrentDepthTokenizer(PreTrainedTokenizer):
    """A text becomes the mark of its beginning and its pieces, as `Tokenizer.encode(text, bos=True)` has it.

    There is no unknown token, as every byte has a piece. Marks come from the model alone: `<s>`, `</s>` and the names of special tokens
    in a text are text, unless `split_special_tokens=False` is asked for. Padding is on the left, with the mark of an end, for generation.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, add_bos_token: bool = True, add_eos_token: bool = False,
                 tokenizer_hash: str | None = None, **others):
        """vocab_file: a SentencePiece model. tokenizer_hash: what its SHA-256 has to be, where that is known.

        ValueError, in one sentence, when it is missing, damaged or another one.
        """
        if vocab_file is None:  # what transformers gives where it finds none
            raise ValueError("there is no tokenizer.model beside the tokenizer's other files: export the model again")
        self._pieces = Tokenizer(Path(vocab_file).absolute())  # `save_vocabulary` copies it from there, wherever the program has gone to
        if tokenizer_hash not in (None, self._pieces.hash):
            raise ValueError(f"{vocab_file} is not the tokenizer that the model was trained with: export the model again")
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self._processor = self._pieces.backend.processor
        marks = {"bos_token": self._pieces.bos_id, "eos_token": self._pieces.eos_id, "pad_token": self._pieces.eos_id}
        for name, number in marks.items():
            others.setdefault(name, self._processor.id_to_piece(number))
        others.setdefault("extra_special_tokens", list(self._pieces.special_tokens))
        others.setdefault("split_special_tokens", True)
        super().__init__(
            vocab_file=vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token, tokenizer_hash=self._pieces.hash, **others
        )

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""
        return self._pieces.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """The id of each piece, and of what was added."""
        return {self._convert_id_to_token(number): number for number in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_) -> list[str]:
        # What was added as text is found in it, also where special tokens are not: transformers then looks for neither.
        added = [token.content for token in self._added_tokens_decoder.values() if not token.special]
        parts = re.split(f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True)))})", text) if added else [text]
        pieces = [[part] if place % 2 else map(self._convert_id_to_token, self._pieces.encode(part)) for place, part in enumerate(parts)]
        return [name for part in pieces for name in part]

    def _convert_token_to_id(self, token: str) -> int:
        return self._processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self._pieces.decode([self._convert_token_to_id(token) for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_) -> str:
        """`Tokenizer.decode`, which leaves marks out; with skip_special_tokens=False they are written."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        text, part = "", []
        for number in ids:
            name = self._added_tokens_decoder.get(number)
            if name is None:
                part.append(number)
            elif number >= self.vocab_size or not skip_special_tokens:
                text, part = text + self._pieces.decode(part), []
                text += "" if skip_special_tokens and number in self.all_special_ids else str(name)
        return text + self._pieces.decode(part)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """The marks that are asked for around one text, or around each of two."""
        before, after = [self.bos_token_id] * self.add_bos_token, [self.eos_token_id] * self.add_eos_token
        first = before + token_ids_0 + after
        return first if token_ids_1 is None else first + before + token_ids_1 + after

    def get_special_tokens_mask(self, token_ids_0: list[int], token_ids_1: list[int] | None = None,
                                already_has_special_tokens: bool = False) -> list[int]:
        """1 where `build_inputs_with_special_tokens` puts a mark, or, for ids that have theirs already, where there is one."""
        if already_has_special_tokens:
            return [int(number in self.all_special_ids) for number in token_ids_0]
        before, after = [1] * self.add_bos_token, [1] * self.add_eos_token
        mask = before + [0] * len(token_ids_0) + after
        return mask if token_ids_1 is None else mask + before + [0] * len(token_ids_1) + after

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the SentencePiece model."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        if target.resolve() != self._pieces.file.resolve():
            shutil.copyfile(self._pieces.file, target)
        return (str(target),)
