"""The verbs that make data, as a user types them: they work on a folder of text, and refuse each bad input in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rdtrain import cli
from rdtrain.data.tokenizer_commands import load_tokenizer
from rdtrain.data.tokenizer_training import train_tokenizer
from rdtrain.errors import UserError


def test_text_to_shards_by_the_commands_alone(rdtrain, text_folder, tmp_path):
    steps = (
        ("corpus", tmp_path / "corpus", "--text", text_folder, "--validation-fraction", 0.1),
        ("tokenizer", "train", tmp_path / "corpus/train.jsonl", "--output", tmp_path / "trained", "--vocab-size", 700, "--model", "unigram",
         "--special-tokens", "<|user|>"),
        ("tokenizer", "import", tmp_path / "trained", tmp_path / "tokenizer", "--multiple-of", 64),
        ("shard", tmp_path / "corpus/train.jsonl", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "train"),
        ("shard", tmp_path / "corpus/validation.jsonl", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "validation"),
    )
    for step in steps:
        result = rdtrain(*step, forked=False)
        assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "train/manifest.json").read_text())
    assert (manifest["vocab_size"], manifest["unused_tokens"]) == (704, 4) and manifest["tokens"] > 50_000


@pytest.mark.parametrize(
    "verb",
    ["", "corpus", "tokenizer import", "shard", "shard inspect", "train", "checkpoint verify", "compare", "evaluate", "export", "generate"],
)
def test_every_verb_explains_itself(rdtrain, verb):
    result = rdtrain(*verb.split(), "--help", forked=False)
    assert result.returncode == 0 and len(result.stdout) > 200


def test_missing_empty_and_binary_text_is_refused(rdtrain, refused, tmp_path):
    def corpus(text):
        return rdtrain("corpus", tmp_path / "corpus", "--text", text)

    refused(corpus(tmp_path / "nothing.txt"), "no such file", "nothing.txt")
    (tmp_path / "empty.txt").touch()
    refused(corpus(tmp_path / "empty.txt"), "no text in", "empty.txt")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    refused(corpus(tmp_path / "blank.txt"), "no text in", "blank.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 9)
    refused(corpus(tmp_path / "binary.txt"), "binary.txt is a binary file")
    assert not (tmp_path / "corpus").exists()


def test_existing_output_is_refused_and_replaced_on_request(rdtrain, refused, text_folder, shards, tmp_path):
    target = shutil.copytree(shards / "validation", tmp_path / "validation")
    before = (target / "manifest.json").read_bytes()
    command = ("shard", text_folder / "1.txt", "--tokenizer", shards / "train/tokenizer.model", "--output", target)
    refused(rdtrain(*command), "exists already", "overwrite")
    assert (target / "manifest.json").read_bytes() == before
    assert rdtrain(*command, "--overwrite").returncode == 0
    assert json.loads((target / "manifest.json").read_text())["documents"] == 1


def test_any_name_of_a_file_can_be_shown_and_a_part_that_is_none_is_refused(rdtrain, shards, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / os.fsdecode(b"a\xff.txt")).write_bytes(b"\xff")
    (tmp_path / "text" / "b.txt").write_text("text")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # as on a terminal that knows no other characters
    command = ("shard", tmp_path / "text", "--tokenizer", shards / "train", "--output", tmp_path / "out")
    result = rdtrain(*command, forked=False)
    assert result.returncode == 0 and "1 not UTF-8, the first is " in result.stdout and "a\\udcff.txt" in result.stdout, result.stderr
    assert "give I/N, such as 1/4" in rdtrain(*command, "--part", "1").stderr


def test_a_missing_or_damaged_tokenizer_is_refused(rdtrain, refused, text_folder, tmp_path):
    command = ("shard", text_folder, "--output", tmp_path / "shards", "--tokenizer")
    refused(rdtrain(*command, tmp_path / "nothing.model"), "no tokenizer at", "rdtrain tokenizer train")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    refused(rdtrain(*command, tmp_path / "broken.model"), "is not a SentencePiece model")


def test_a_tokenizer_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "tokenizer.model").touch()
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        load_tokenizer(tmp_path)


def test_a_reader_that_has_seen_enough_ends_a_command_as_sigpipe_would(monkeypatch):
    def printing(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "build_parser", lambda: Namespace(parse_args=lambda words: Namespace(run=printing)))
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)  # pytest has need of standard output
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 141


def test_a_full_disk_below_standard_output_is_one_sentence():
    command = [sys.executable, "-m", "rdtrain.cli", "train", "--print-config"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("rdtrain: the disk is full") and result.stderr.count("\n") == 1, result.stderr


def test_a_tokenizer_that_does_not_match_the_shards_is_refused(rdtrain, refused, text_folder, tiny_config, tmp_path):
    other = train_tokenizer([text_folder], tmp_path / "other", 600)
    assert rdtrain("shard", text_folder / "9.txt", "--tokenizer", tmp_path / "other", "--output", tmp_path / "odd").returncode == 0
    result = rdtrain("train", "--config", tiny_config(data={"validation": str(tmp_path / "odd")}))
    refused(result, "was written with tokenizer", other.hash[:12])


def test_shards_rewritten_with_another_tokenizer_do_not_continue_a_run(rdtrain, refused, text_folder, tiny_config, shards, tmp_path):
    """Same path, same config, same vocabulary size: only the checkpoint's own record can tell."""
    data = shutil.copytree(shards, tmp_path / "data")
    config = tiny_config(data={"train": str(data / "train"), "validation": str(data / "validation")})
    assert rdtrain("train", "--config", config).returncode == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    train_tokenizer([text_folder / "1.txt", text_folder / "2.txt"], tmp_path / "other", 800)
    for side in ("train", "validation"):
        command = ("shard", text_folder, "--tokenizer", tmp_path / "other", "--output", data / side, "--overwrite")
        assert rdtrain(*command).returncode == 0
    refused(rdtrain("train", "--config", config), "was trained with tokenizer", "use shards of the checkpoint's tokenizer")


def test_a_truncated_shard_is_refused(rdtrain, refused, tiny_config, shards, tmp_path):
    broken = shutil.copytree(shards / "train", tmp_path / "broken")
    file = broken / "arrays.zarr/tokens/c/0"
    os.truncate(file, file.stat().st_size - 100)
    refused(rdtrain("train", "--config", tiny_config(data={"train": str(broken)})), "tokens/c/0 has", "bytes, not")


def test_shards_shorter_than_a_sequence_are_refused(rdtrain, refused, tiny_config):
    refused(rdtrain("train", "--config", tiny_config(data={"sequence_length": 10_000_000})), "fewer than one window")


