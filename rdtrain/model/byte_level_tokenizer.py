"""`Tokenizer` over a tokenizer.json of Hugging Face's library `tokenizers`: byte-level BPE, as GPT-2, Llama 3 or Qwen have it.

    post_processor of the file: `<bos> A` for a text, `<bos> A <eos> <bos> B` for two, as documents stand in shards

Notable: the template above, which `rdtrain tokenizer import` writes, is where the file says which of its tokens are the marks; so one
file is all there is, and transformers, which reads the same file, puts the same mark before a text. Byte-level means that each piece is
some bytes, whatever stands beside it: no other of the library's kinds gives back every text.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers

from .tokenizer import IMPORT_MAY_MEND

# How many threads there are is said by who calls: the library's own, one for each core in each process, would be in sharding's way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
KEEPING = ("Split", "Digits", "Punctuation")  # what may cut a text before its pieces are bytes, as long as it removes nothing


class ByteLevelBackend:
    """Attributes as those of `Tokenizer`, and controls, the ids of special tokens, which no text becomes and which decode to nothing."""

    def __init__(self, content: bytes, file: Path):
        """content: of `file`, a tokenizer.json. ValueError, in one sentence, for one that `Tokenizer` cannot work with."""
        try:
            tree = json.loads(content.decode())
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            reason = (str(error).splitlines() or ["empty"])[0]
            raise ValueError(f"{file} is not a tokenizer of Hugging Face's kind, or is damaged ({reason}); give a whole one") from None
        self.hash = hashlib.sha256(canonical(tree)).hexdigest()
        if loss := what_loses_text(tree):
            raise ValueError(f"{file} may change text or lose some ({loss}); {IMPORT_MAY_MEND}")
        try:
            self.bos_id, self.eos_id = marks_of(tree)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ValueError(f"{file} does not say which tokens mark the ends of a document; make one that does with `rdtrain tokenizer "
                             "import`") from None
        self._tokenizer.encode_special_tokens = True  # what looks like one in a text is text
        names = {token: name for name, token in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(names) + 1
        self._names = [names.get(token, "") for token in range(self.vocab_size)]
        added = self._tokenizer.get_added_tokens_decoder()
        self.controls = frozenset(token for token, one in added.items() if one.special)
        self._literal = {token: one.content for token, one in added.items() if not one.special}
        for token, text in self._literal.items():
            if self.decode([token]) != text:
                raise ValueError(f"{file} changes text: its added token {text!r} comes back as {self.decode([token])!r}; give a tokenizer "
                                 "without it")
        for token in self.controls:
            name = self._names[token]
            for text in (name, tokenizers.decoders.ByteLevel().decode([name])):  # the latter is what a merge would have made it of
                if token in self._encode(text):
                    raise ValueError(f"{file} has the special token {name!r}, which the text {text!r} becomes as well; give a tokenizer, "
                                     "or marks, for which that is not so")
        if not {self.bos_id, self.eos_id} <= self.controls:
            raise ValueError(f"{file} has marks that are not special tokens, so that a text could hold them; import it again with `rdtrain "
                             "tokenizer import`")

    def _encode(self, text: str) -> list[int]:
        # Unlike `encode`, a batch computes no offsets, which nobody asks for, and lets go of the interpreter meanwhile.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """As `Tokenizer.encode_batch`."""
        if threads == 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    def decode(self, ids: list[int]) -> str:
        """As `Tokenizer.decode`."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def name(self, token: int) -> str:
        """The piece as the file writes it: a letter for each byte, but for added tokens."""
        return self._names[token]

    def token_bytes(self, token: int) -> int:
        """The bytes of a piece that is no special token."""
        return len(self._literal[token].encode()) if token in self._literal else len(self._names[token])


def canonical(tree: dict) -> bytes:
    """A tokenizer.json in the one form that `rdtrain tokenizer import` writes and a hash is made of: others lay the same content out
    otherwise when they save it."""
    return json.dumps(tree, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def what_loses_text(tree: dict) -> str | None:
    """What in the tree of a tokenizer.json may change text or lose some, in a few words; None for a byte-level one that does not."""
    before = tree.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    last = steps[-1] if steps else {}
    model, decoder = tree.get("model", {}), tree.get("decoder") or {}
    if model.get("type") != "BPE" or last.get("type") != "ByteLevel" or decoder.get("type") != "ByteLevel":
        return "it is not byte-level BPE"
    if not set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys():
        return "it has no pieces for some bytes"
    if model.get("dropout"):
        return "its merges are random"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its pieces have marks within words"
    if tree.get("normalizer"):
        return f"its normalizer, {tree['normalizer'].get('type')}"
    if any(step.get("add_prefix_space") for step in steps):
        return "a space is put before a text"
    if any(step.get("type") not in KEEPING or step.get("behavior") == "Removed" for step in steps[:-1]):
        return "its pre-tokenizer may remove text"
    if tree.get("truncation"):
        return "long texts are cut"
    return None


def marks_template(bos: str, bos_id: int, eos: str, eos_id: int) -> dict:
    """The post_processor that says which tokens are the marks, see above."""
    def mark(name: str, sequence: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": sequence}}

    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    special = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ((bos, bos_id), (eos, eos_id))}
    return {"type": "TemplateProcessing", "single": [mark(bos, 0), first], "special_tokens": special,
            "pair": [mark(bos, 0), first, mark(eos, 0), mark(bos, 1), second]}


def marks_of(tree: dict) -> tuple[int, int]:
    """(bos_id, eos_id) as `marks_template` wrote them. KeyError, TypeError, ValueError or IndexError where it did not."""
    template = tree["post_processor"]
    (bos, eos) = (template["pair"][place]["SpecialToken"]["id"] for place in (0, 2))
    (bos_id,), (eos_id,) = (template["special_tokens"][name]["ids"] for name in (bos, eos))
    if template != marks_template(bos, bos_id, eos, eos_id):
        raise ValueError
    return bos_id, eos_id
