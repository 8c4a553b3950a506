"""The tokenizer gives every text back, is the same for the same input, and refuses models that could not do so."""

import hashlib
import io
import json
import random
import shutil
from functools import partial

import pytest
import sentencepiece
import transformers

from rdtrain.data import encoding
from rdtrain.data.tokenizer_benchmark import benchmark_tokenizers
from rdtrain.data.tokenizer_import import import_tokenizer
from rdtrain.data.tokenizer_training import sample_lines, train_tokenizer
from rdtrain.model.tokenization_rdtrain import RecurrentDepthTokenizer
from rdtrain.model.tokenizer import Tokenizer

HARD = ["", " ", "   ", "\n", "\n\n\n", "a\n\n  b \n", "  leading", "trailing  ", "two  spaces", "\t\tx\t", "\0", "a\0b",
        "\r\n\r", "\u2581", "a\u2581b", " \u2581 \u2581\u2581", "\n\u2581\n", "\U0001f600\U0001f468\u200d\U0001f469",
        "e\u0301 \u00e9 \ufb01 \u212b", "\ufeffx",
        "\u2028\x85\x0c\x0b\x1c", "\ufffd\uffff\U0010ffff", "<s></s><unk><0x41>", "\u2585\u2047 \u2047", "1234567890"]
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


SPECIAL = "<|user|>"


def train_model(texts, **options) -> bytes:
    """A SentencePiece model that keeps every text, but for the options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter("\n".join(texts).split("\n")), "model_writer": model, "vocab_size": 600, "model_type": "bpe",
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": False, "minloglevel": 2} | options)
    return model.getvalue()


@pytest.fixture(scope="module")
def unigram(text_folder, tmp_path_factory):
    """A unigram tokenizer, with a special token, of 1.5 times 512 pieces."""
    return train_tokenizer([text_folder], tmp_path_factory.mktemp("unigram") / "tokenizer", 700, model="unigram", special_tokens=[SPECIAL],
                           multiple_of=256)


@pytest.fixture(scope="module")
def imported(texts, byte_level_folder, tmp_path_factory):
    """Tokenizers of others', imported: name -> (the tokenizer, what was turned off)."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "llama.model").write_bytes(train_model(texts, add_dummy_prefix=True, control_symbols=[SPECIAL]))
    (folder / "t5.model").write_bytes(train_model(texts, add_dummy_prefix=True, normalization_rule_name="nmt_nfkc",
                                                  remove_extra_whitespaces=True))
    (folder / "gemma.model").write_bytes(train_model(texts, user_defined_symbols=["\n\n", "\n\n\n", "\u2581\u2581\u2581"]))
    tree = json.loads((byte_level_folder / "tokenizer.json").read_text())
    words = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
    tree["normalizer"] = {"type": "NFC"}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, {**tree["pre_tokenizer"], "use_regex": False}]}
    (folder / "qwen.json").write_text(json.dumps(tree, indent=1))
    made = {name: import_tokenizer(folder / name, folder / name.split(".")[0], multiple_of=64) for name in ("llama.model", "t5.model")}
    made["gemma.model"] = import_tokenizer(folder / "gemma.model", folder / "gemma")
    made["qwen.json"] = import_tokenizer(folder / "qwen.json", folder / "qwen", "<|begin|>", "<|begin|>", multiple_of=64)
    return made | {"gpt2": import_tokenizer(byte_level_folder, folder / "gpt2", multiple_of=128)}


@pytest.fixture(scope="module")
def every_kind(tokenizer, unigram, imported):
    return [tokenizer, unigram, *(one for one, _ in imported.values())]


def test_hard_texts_come_back_and_never_hold_a_mark(every_kind):
    for tokenizer in every_kind:
        marks = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_tokens.values()}
        texts = [*HARD, *(f"a{tokenizer.backend.name(token)} b" for token in marks), f"{SPECIAL}<|begin|><|unused_0|>"]
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
            assert not marks & set(ids) and max(ids, default=0) < tokenizer.vocab_size - tokenizer.unused_tokens
            assert sum(map(tokenizer.token_bytes, tokenizer.encode(text, True, True))) == len(text.encode())
        assert tokenizer.decode(list(tokenizer.special_tokens.values())) == ""


@pytest.mark.parametrize("number", range(7))
def test_random_texts_come_back(every_kind, number):
    tokenizer, draw = every_kind[number], random.Random(0)
    alphabets = [range(128), range(0x2500, 0x2600), [*range(0xD800), *range(0xE000, 0x110000)], [32, 10, 0x2581, 97]]
    texts = ["".join(map(chr, draw.choices(alphabet, k=draw.randrange(200)))) for alphabet in alphabets for _ in range(200)]
    batch = tokenizer.encode_batch(texts, threads=2)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


def test_lines_are_encoded_as_sentencepiece_encodes_the_whole(every_kind, texts):
    for tokenizer in every_kind:
        # Of a unigram model a long text's sums are too large for fp32 to tell pieces of nearly the same score apart.
        if tokenizer.file_name == "tokenizer.model" and tokenizer is not every_kind[1]:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file))
            assert tokenizer.encode_batch(texts) == processor.encode(texts)


def test_segments_are_encoded_as_the_whole(every_kind, texts, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", 2000)
    for tokenizer in every_kind:
        for text, whole in zip(texts, tokenizer.encode_batch(texts)):
            parts = list(encoding.segments(text))
            assert len(parts) > 3 and whole == sum(tokenizer.encode_batch(parts), [])


def test_what_is_imported_keeps_its_pieces_and_says_what_it_changes(imported, byte_level_folder, texts):
    space, rule = "a space put before or after a text", "normalisation"
    assert {name: turned_off for name, (_, turned_off) in imported.items()} == {
        "llama.model": [space], "t5.model": [space, "the removal of spaces", rule], "gemma.model": [], "qwen.json": [rule], "gpt2": []}
    sizes = {name: (one.vocab_size, one.unused_tokens) for name, (one, _) in imported.items()}
    assert sizes == {"llama.model": (640, 40), "t5.model": (640, 40), "gemma.model": (600, 0), "qwen.json": (704, 4), "gpt2": (768, 68)}
    for name in ("llama.model", "gemma.model"):
        given, ours = imported[name][0].file.parents[1] / name, imported[name][0]
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(given))
        assert [theirs.id_to_piece(token) for token in range(600)] == list(map(ours.backend.name, range(600)))
        prefix = "\n" if name == "llama.model" else ""  # what Llama's puts before a text is then a line of its own
        line = theirs.encode(prefix)
        assert all(theirs.encode(prefix + text) == line + ours.encode(text) for text in texts[:3])
    assert imported["gemma.model"][0].file.read_bytes() == given.read_bytes()
    theirs, (ours, _) = transformers.AutoTokenizer.from_pretrained(byte_level_folder), imported["gpt2"]
    assert [theirs(text, add_special_tokens=False).input_ids for text in texts] == ours.encode_batch(texts)
    assert (ours.backend.name(ours.bos_id), ours.backend.name(ours.eos_id)) == ("<|begin|>", "<|end|>")
    assert ours.special_tokens == {SPECIAL: 2}
    qwen = imported["qwen.json"][0]
    assert qwen.bos_id == qwen.eos_id == 0


def test_the_same_content_has_the_same_hash(imported, byte_level_folder, tmp_path):
    shutil.copytree(byte_level_folder, tmp_path / "again")
    file = tmp_path / "again/tokenizer.json"
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=3))
    again, _ = import_tokenizer(tmp_path / "again", tmp_path / "a", multiple_of=128)
    twice, _ = import_tokenizer(again.file, tmp_path / "b", "<|begin|>", "<|end|>", multiple_of=128)
    assert imported["gpt2"][0].hash == again.hash == twice.hash
    assert import_tokenizer(file, tmp_path / "c", "<|end|>", "<|begin|>", multiple_of=128)[0].hash != again.hash
    llama = imported["llama.model"][0]
    assert import_tokenizer(llama.file, tmp_path / "d")[0].hash == llama.hash
    facts = json.loads((tmp_path / "d/import.json").read_text())
    assert facts["hash"] == llama.hash and facts["unused_tokens"] == 40


def test_tokenizers_that_cannot_be_imported_are_refused_in_one_sentence(byte_level_folder, texts, tmp_path, fault):
    content = (byte_level_folder / "tokenizer.json").read_text()
    file = tmp_path / "tokenizer.json"

    def refusal(change=lambda tree: None, *marks) -> str:
        tree = json.loads(content)
        change(tree)
        file.write_text(json.dumps(tree))
        message = fault(lambda: import_tokenizer(file, tmp_path / "out", *(marks or ("<|begin|>", "<|end|>"))))
        assert not (tmp_path / "out").exists()
        return message

    assert "names no token that marks the beginning of a document; give --bos one of its special tokens, such as <|begin|>" in refusal(
        lambda tree: None, None)
    assert "has no special token '<s>' to mark the beginning of" in refusal(lambda tree: None, "<s>")
    assert "the text ' the' becomes as well" in refusal(lambda tree: None, "\u0120the", "<|end|>")
    assert "it is not byte-level BPE" in refusal(lambda tree: tree.update(decoder={"type": "ByteFallback"}))
    assert "no pieces for some bytes" in refusal(lambda tree: tree["model"]["vocab"].pop("\u0142") and tree["model"].update(merges=[]))
    assert "(its merges are random); give another tokenizer" in refusal(lambda tree: tree["model"].update(dropout=0.1))
    assert "may remove text" in refusal(lambda tree: tree.update(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, tree["pre_tokenizer"]]}))
    literal = {"id": 700, "content": "caf\u00e9", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": False}
    assert "its added token 'caf\u00e9' comes back as 'caf\ufffd'" in refusal(lambda tree: tree["added_tokens"].append(literal))
    file.write_text("{}")
    assert "is damaged" in fault(lambda: import_tokenizer(file, tmp_path / "out"))
    (tmp_path / "tokenizer.model").write_bytes(train_model(texts, byte_fallback=False))
    assert "holds both tokenizer.model and tokenizer.json; give one" in fault(lambda: import_tokenizer(tmp_path, tmp_path / "out"))
    assert "no pieces for single bytes" in fault(lambda: import_tokenizer(tmp_path / "tokenizer.model", tmp_path / "out"))
    assert "to mark the beginning of a document; give one of its special tokens, such as <s>, </s>" in fault(
        lambda: import_tokenizer(tmp_path / "tokenizer.model", tmp_path / "out", bos="the"))
    with pytest.raises(ValueError, match="does not say which tokens mark the ends .*`rdtrain tokenizer import"):
        Tokenizer(byte_level_folder)


def test_marks_and_attributes(tokenizer):
    assert tokenizer.encode("x", bos=True, eos=True) == [tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 800)
    assert (tokenizer.special_tokens, tokenizer.unused_tokens) == ({}, 0)
    assert tokenizer.hash == hashlib.sha256(tokenizer.file.read_bytes()).hexdigest()
    assert Tokenizer(tokenizer.file).hash == Tokenizer(tokenizer.file.parent).hash == tokenizer.hash


def test_digits_are_single(tokenizer, unigram):
    assert len(tokenizer.encode("2026")) == len(unigram.encode("2026")) == 4


def test_transformers_knows_the_special_tokens_and_takes_their_names_for_text_unless_asked(unigram):
    theirs, text = RecurrentDepthTokenizer(str(unigram.file)), f"hi {SPECIAL} you"
    assert theirs(text).input_ids == unigram.encode(text, bos=True)
    assert theirs(SPECIAL, split_special_tokens=False).input_ids == [1, 3] and theirs.convert_tokens_to_ids(SPECIAL) == 3
    assert (theirs.decode([1, 3]), theirs.decode([1, 3], skip_special_tokens=True)) == (f"<s>{SPECIAL}", "")


def test_special_tokens_have_ids_of_their_own_and_a_vocabulary_is_rounded_up_by_learning(unigram):
    assert unigram.special_tokens == {SPECIAL: 3} and (unigram.vocab_size, unigram.unused_tokens) == (768, 0)
    processor = unigram.backend.processor
    assert processor.is_control(3) and processor.is_byte(4) and not processor.is_control(767)


def test_bad_text_and_bad_ids(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 .* U\+DC01"):
        tokenizer.encode("ab\udc01")
    for ids in ([800], [-1, 5]):
        with pytest.raises(ValueError, match="outside the vocabulary of 800"):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("options, reason", [
    ({"byte_fallback": False}, "single bytes"),
    ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
    ({"add_dummy_prefix": True}, "changes text"),
    ({"remove_extra_whitespaces": True}, "changes text"),
    ({"eos_id": -1}, "ends of a document"),
    ({"user_defined_symbols": ["a\nb"]}, "line end"),
])
def test_models_that_lose_text_are_refused(tmp_path, texts, options, reason):
    (tmp_path / "other.model").write_bytes(train_model(texts, **options))
    with pytest.raises(ValueError, match=reason):
        Tokenizer(tmp_path / "other.model")


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer(tmp_path)
    for content in (b"", b"hello"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError):
            Tokenizer(tmp_path)


def test_training_is_deterministic_and_keeps_its_facts(tmp_path, tokenizer, text_folder):
    again = train_tokenizer([text_folder], tmp_path / "again", vocab_size=800)
    assert again.hash == tokenizer.hash
    facts = json.loads((tmp_path / "again/training.json").read_text())
    assert facts["hash"] == again.hash and facts["vocab_size"] == 800 and facts["inputs"][0]["name"] == "0.txt"
    assert [file.name for file in tmp_path.iterdir()] == ["again"]


def test_training_faults(tmp_path, fault, text_folder):
    output = tmp_path / "out"
    assert "out of range; ask for 512" in fault(lambda: train_tokenizer([text_folder], output, 100))
    assert "too large for this text; ask for" in fault(lambda: train_tokenizer([text_folder], output, 10**6))
    assert "no such file" in fault(lambda: train_tokenizer([tmp_path / "none.txt"], output, 800))
    (tmp_path / "chinese.txt").write_text("".join(map(chr, range(0x4E00, 0x5E00))))
    for model in ("bpe", "unigram"):
        train = partial(train_tokenizer, output=output, model=model)
        assert "too small for this text's characters" in fault(partial(train, [tmp_path / "chinese.txt"], vocab_size=800))
        assert "too large for this text; ask for" in fault(partial(train, [text_folder / "1.txt"], vocab_size=10**6))
    for names in ([""], ["a b"], ["\u2581"], ["<s>"], ["<0x41>"], ["<a>", "<a>"]):
        assert "cannot be a special token" in fault(partial(train_tokenizer, [text_folder], output, 800, special_tokens=names))
    assert [file.name for file in tmp_path.iterdir()] == ["chinese.txt"]


def test_an_output_is_replaced_only_on_request_and_only_by_its_like(tmp_path, fault, text_folder):
    output = tmp_path / "out"
    train_tokenizer([text_folder], output, 700)
    assert "exists already" in fault(lambda: train_tokenizer([text_folder], output, 800))
    fault(lambda: train_tokenizer([text_folder], output, 10**6, overwrite=True))
    assert Tokenizer(output).vocab_size == 700, "a failed training must leave the old output"
    assert train_tokenizer([text_folder], output, 800, overwrite=True).vocab_size == 800
    other = tmp_path / "other"
    shutil.copytree(text_folder, other)
    assert "not an earlier output" in fault(lambda: train_tokenizer([text_folder], other, 800, overwrite=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out"]


def test_the_sample_is_bounded_and_spread():
    documents = ["\n".join(f"{document} {line:04}" for line in range(1000)) for document in range(10)]
    sample = sample_lines(documents, 6000)
    assert len(sample) == 1000 and sample == sorted(sample) and sample == sample_lines(documents, 6000)
    assert all(60 < sum(line.startswith(f"{document} ") for line in sample) < 140 for document in range(10))
    assert sample_lines(["x" * 2500], 10**6) == ["x" * 1000, "x" * 1000, "x" * 500]


def test_text_without_a_space_trains_a_tokenizer_that_knows_spaces(tmp_path):
    text = "".join(chr(0x4E00 + (7 * number) % 211) for number in range(4000))
    (tmp_path / "chinese.txt").write_text(text)
    tokenizer = train_tokenizer([tmp_path / "chinese.txt"], tmp_path / "tokenizer", 600)
    assert tokenizer.decode(tokenizer.encode("a b  c\n" + text)) == "a b  c\n" + text


def test_the_benchmark_measures_each_tokenizer_on_the_same_text(imported, text_folder, fault):
    paths = [imported[name][0].file for name in ("llama.model", "gpt2")]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in benchmark_tokenizers(paths, [text_folder], 0.05, 2, 1).split("\n")]
    assert [row[:2] for row in rows[2:]] == [[str(path), f"{Tokenizer(path).vocab_size}"] for path in paths]
    assert rows[2][5] == rows[2][8] == "1.00" and all(float(figure) > 0 for row in rows[2:] for figure in row[2:])
    assert "measure nothing" in fault(lambda: benchmark_tokenizers(paths, [text_folder], 0))
