"""The tokenizer gives every text back, is the same for the same input, and refuses models that could not do so."""

import hashlib
import io
import json
import random
import shutil

import pytest
import sentencepiece

from rdtrain.data.tokenizer_training import sample_lines, train_tokenizer
from rdtrain.model.tokenizer import Tokenizer

HARD = ["", " ", "   ", "\n", "\n\n\n", "a\n\n  b \n", "  leading", "trailing  ", "two  spaces", "\t\tx\t", "\0", "a\0b",
        "\r\n\r", "\u2581", "a\u2581b", " \u2581 \u2581\u2581", "\n\u2581\n", "\U0001f600\U0001f468\u200d\U0001f469",
        "e\u0301 \u00e9 \ufb01 \u212b", "\ufeffx",
        "\u2028\x85\x0c\x0b\x1c", "\ufffd\uffff\U0010ffff", "<s></s><unk><0x41>", "\u2585\u2047 \u2047", "1234567890"]


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_random_texts_come_back(tokenizer):
    draw = random.Random(0)
    alphabets = [range(128), range(0x2500, 0x2600), [*range(0xD800), *range(0xE000, 0x110000)], [32, 10, 0x2581, 97]]
    texts = ["".join(map(chr, draw.choices(alphabet, k=draw.randrange(200)))) for alphabet in alphabets for _ in range(200)]
    batch = tokenizer.encode_batch(texts, threads=2)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


def test_lines_are_encoded_as_sentencepiece_encodes_the_whole(tokenizer, texts):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file))
    assert tokenizer.encode_batch(texts) == processor.encode(texts)


def test_marks_and_attributes(tokenizer):
    assert tokenizer.encode("x", bos=True, eos=True) == [tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 800)
    assert tokenizer.hash == hashlib.sha256(tokenizer.file.read_bytes()).hexdigest()
    assert Tokenizer(tokenizer.file).hash == Tokenizer(tokenizer.file.parent).hash == tokenizer.hash


def test_digits_are_single(tokenizer):
    assert len(tokenizer.encode("2026")) == 4


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
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter("\n".join(texts).split("\n")), "model_writer": model, "vocab_size": 600, "model_type": "bpe",
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": False, "minloglevel": 2} | options)
    (tmp_path / "other.model").write_bytes(model.getvalue())
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
    assert "too small for this text's characters" in fault(lambda: train_tokenizer([tmp_path / "chinese.txt"], output, 800))
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
