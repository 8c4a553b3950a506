"""`rdtrain tokenizer import`: somebody else's tokenizer, as one file that `rdtrain.model.tokenizer.Tokenizer` takes.

    tokenizer.model or tokenizer.json    the tokenizer
    import.json                          where it is from, and what of it was turned off

Notable: pieces and their ids stay as they are. What would change text before it is encoded is turned off: a space put before the text,
Unicode normalisation, the removal of spaces. Where that was on, the ids of some texts are not those that the original gives (Llama 2's
begin with the piece of a space), but every text comes back. A tokenizer that would lose text even so is refused.
"""

import json
from pathlib import Path

import sentencepiece
import tokenizers

from ..errors import UserError, first_line
from ..model.byte_level_tokenizer import canonical, marks_template
from ..model.sentencepiece_tokenizer import SPACE_MARK
from ..model.tokenizer import IMPORT_MAY_MEND, UNUSED, Tokenizer, tokenizer_file
from .output import output_folder

NORMALISED = ("\ufb01", "e\u0301", "\uff11", "A", "\x85", "\t")  # what one rule or another changes
CONTROL = 3  # SentencePiece's number for a control symbol


def import_tokenizer(path: Path, output: Path, bos: str | None = None, eos: str | None = None, multiple_of: int = 1,
                     overwrite: bool = False) -> tuple[Tokenizer, list[str]]:
    """Writes the tokenizer `path` to the folder `output`; returns it and what was turned off, in words.

    path: a SentencePiece model, a tokenizer.json, or a folder with one of them, such as Hugging Face's `save_pretrained` writes. bos, eos:
    the names of the tokens that mark the ends of a document; None: those that the model, or tokenizer_config.json beside it, names.
    multiple_of: the vocabulary is rounded up to a multiple of it by tokens that no text has and that are never drawn.
    The same content gives the same file, and so the same hash. Raises UserError for a tokenizer that is damaged, has no such marks or
    would lose text, an existing output, and a disk that refuses.
    """
    if multiple_of < 1:
        raise UserError(f"a vocabulary cannot be a multiple of {multiple_of}; give 1 or more")
    try:
        file = tokenizer_file(path)
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    convert = _byte_level if file.suffix == ".json" else _sentencepiece
    with output_folder(output, "import.json", overwrite) as folder:
        content, turned_off = convert(file, content, bos, eos, multiple_of)
        try:
            written = folder / ("tokenizer.json" if file.suffix == ".json" else "tokenizer.model")
            written.write_bytes(content)
            tokenizer = Tokenizer(written)
        except ValueError as error:
            reason = str(error).replace(str(written), str(file)).replace(IMPORT_MAY_MEND, "give another tokenizer")
            raise UserError(reason) from None
        facts = {"imported_from": str(file), "turned_off": turned_off, "vocab_size": tokenizer.vocab_size,
                 "unused_tokens": tokenizer.unused_tokens, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "hash": tokenizer.hash}
        (folder / "import.json").write_text(json.dumps(facts, indent=2) + "\n")
    return Tokenizer(output), turned_off


def _sentencepiece(file: Path, content: bytes, bos: str | None, eos: str | None, multiple_of: int) -> tuple[bytes, list[str]]:
    """(the model, what was turned off). Where nothing is to be changed, the model is byte for byte the one given."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)
    except RuntimeError:
        raise UserError(f"{file} is not a SentencePiece model, or is damaged; give a whole one") from None
    turned_off = []
    if processor.normalize("a").strip("a"):
        turned_off.append("a space put before or after a text")
    if processor.normalize("x a  b ").replace(SPACE_MARK, " ").strip() != "x a  b":
        turned_off.append("the removal of spaces")
    if any(processor.normalize(f"a{text}b").strip(SPACE_MARK) != f"a{text}b" for text in NORMALISED):
        turned_off.append("normalisation")
    # A message of Protocol Buffers may be continued by its own fields: repeated ones are appended, the last of any other counts.
    changes = b""
    if turned_off:
        changes += _field(3, _field(1, b"identity") + _field(2, b"") + _number(3, 0) + _number(4, 0))  # normalizer_spec
    for number, option, name in ((46, "bos", bos), (47, "eos", eos)):  # trainer_spec: bos_piece, eos_piece
        if name is not None:
            if not processor.is_control(processor.piece_to_id(name)):
                names = [processor.id_to_piece(token) for token in range(processor.vocab_size()) if processor.is_control(token)]
                raise UserError(_no_mark(file, name, names, option))
            changes += _field(2, _field(number, name.encode()))
    if missing := -processor.vocab_size() % multiple_of:
        changes += b"".join(_field(1, _field(1, UNUSED.format(number).encode()) + _number(3, CONTROL)) for number in range(missing))
        changes += _field(2, _number(4, processor.vocab_size() + missing))  # trainer_spec: vocab_size
    if not changes:
        return content, turned_off
    processor.load_from_serialized_proto(content + changes)
    return processor.serialized_model_proto(), turned_off


def _field(number: int, content: bytes) -> bytes:
    """A field with a length, in the wire format of Protocol Buffers."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _byte_level(file: Path, content: bytes, bos: str | None, eos: str | None, multiple_of: int) -> tuple[bytes, list[str]]:
    """(the tokenizer.json, what was turned off), the same for the same content however the file is laid out."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        reason = first_line(error)
        raise UserError(f"{file} is not a tokenizer of Hugging Face's kind, or is damaged ({reason}); give a whole one") from None
    if -tokenizer.get_vocab_size() % multiple_of:
        missing = -tokenizer.get_vocab_size() % multiple_of
        names = [UNUSED.format(number) for number in range(missing)]
        tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    tree = json.loads(tokenizer.to_str())
    turned_off = _turn_off(tree)
    named = _named_marks(file)
    marks = []
    for option, name in (("bos", bos or named.get("bos_token")), ("eos", eos or named.get("eos_token"))):
        special = {one["content"]: one for one in tree["added_tokens"]}
        if name is None or tokenizer.token_to_id(name) is None:
            raise UserError(_no_mark(file, name, [one for one in special if special[one]["special"]], option))
        if name not in special:  # a piece as any other, which a text could become
            tree["added_tokens"].append({"id": tokenizer.token_to_id(name), "content": name, "single_word": False, "lstrip": False,
                                         "rstrip": False, "normalized": False, "special": True})
            tree["added_tokens"].sort(key=lambda one: one["id"])
        else:
            special[name]["special"] = True
        marks += [name, tokenizer.token_to_id(name)]
    tree["post_processor"] = marks_template(*marks)
    return canonical(tree), turned_off


def _turn_off(tree: dict) -> list[str]:
    """Takes out of the tree of a tokenizer.json what changes or cuts text before it is encoded; returns what that was."""
    turned_off = []
    if tree["normalizer"]:
        turned_off.append("normalisation")
        tree["normalizer"] = None
    before = tree["pre_tokenizer"] or {}
    for step in (before, *before.get("pretokenizers", [])):
        if step.get("type") == "ByteLevel" and step["add_prefix_space"]:
            turned_off.append("a space put before a text")
            step["add_prefix_space"] = False
    if tree["truncation"]:
        turned_off.append("the truncation of long texts")
    tree["truncation"] = tree["padding"] = None
    return turned_off


def _named_marks(file: Path) -> dict[str, str]:
    """bos_token and eos_token of the tokenizer_config.json beside a file, where it names them."""
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        given = json.loads(config.read_text(encoding="utf-8"))
        names = {name: given.get(name) for name in ("bos_token", "eos_token")}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{config} cannot be read as JSON; mend it, or give the tokenizer.json alone with --bos and --eos") from None
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in names.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _no_mark(file: Path, name: str | None, names: list[str], option: str) -> str:
    known = f"one of its special tokens, such as {', '.join(names[:4])}" if names else "a tokenizer with special tokens"
    which = {"bos": "beginning", "eos": "end"}[option]
    if name is None:
        return f"{file} names no token that marks the {which} of a document; give --{option} {known}"
    return f"{file} has no special token {name!r} to mark the {which} of a document; give {known}"
