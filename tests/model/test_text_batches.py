"""A file of prompts and a conversation: what is written is what each prompt gives alone, and what is wrong is said in one sentence."""

import errno
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from rdtrain.model.console import Console
from rdtrain.model.generation import TextGenerator
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.sampling import Sampling
from rdtrain.model.text_batches import claimed, continue_prompts, read_prompts

PROMPTS = ["The function returns", "", "A", "\u00e9\U0001f600 \x00", "The list of the"]


@pytest.fixture(scope="module")
def generator(build_model, tokenizer):
    return TextGenerator(build_model(True, vocab_size=tokenizer.vocab_size), NoiseSchedule(NoiseSettings()), tokenizer)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    lines[2]["seed"] = 77
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_of_prompts_gives_what_each_gives_alone_and_goes_on_where_it_stopped(generator, source, tmp_path, capsys):
    def run(output, batch=2, sampling=Sampling(temperature=0.9)):  # noqa: B008
        continue_prompts(generator, source, tmp_path / output, 3, sampling, 5, 9, batch, 64)
        return (tmp_path / output).read_text()

    whole = run("a.jsonl")
    lines = [json.loads(line) for line in whole.split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == PROMPTS and [line["seed"] for line in lines] == [5, 6, 77, 8, 9]
    for line in lines:
        alone = "".join(generator.stream(line["prompt"], 9, 3, Sampling(temperature=0.9), line["seed"]))
        assert line["continuation"] == alone and line["tokens"] == 9 and not line["ended"]
    assert "5/5 texts" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text("\n".join(whole.split("\n")[:4])[:-20])
    assert run("b.jsonl", batch=5) == whole and "3 of them kept" in capsys.readouterr().err
    assert run("b.jsonl") == whole
    with pytest.raises(ValueError, match="^line 1 of .*b.jsonl is of another prompt, seed or setting: give another output"):
        run("b.jsonl", sampling=Sampling())
    exiting = Sampling(exit="entropy", exit_threshold=7.0)
    exits = [json.loads(line) for line in run("c.jsonl", sampling=exiting).split("\n")[:-1]]
    assert exits == [json.loads(line) for line in run("d.jsonl", 1, exiting).split("\n")[:-1]]
    assert all(line["iterations_used"] == pytest.approx((3 + 8 * 1) / 9) for line in exits)  # the prompt has no exit


@pytest.mark.parametrize("content, match", [
    (b'{"prompt": "a"}\n{"text": "b"}\n', "^line 2 of .* is not .*: mend it$"), (b'{"prompt": "a\xff"}\n', "^line 1 of .*UTF-8"),
    (b'{"prompt": "a", "seed": "x"}', "^line 1 of .*whole"), (b'{"prompt": "\\ud800"}', "lone surrogate U.D800"),
    pytest.param(b"[" * 100_000, "^line 1 of .*: mend it$", id="brackets within brackets"),
    (b'{"prompt": "a"}\n{"prompt": "' + b"a b " * 40 + b'"}', "^prompt 2 of .* has .* longer than the 64 that the cache holds: shorten it"),
])
def test_a_bad_file_of_prompts_is_refused_before_any_work(generator, tmp_path, content, match):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        continue_prompts(generator, tmp_path / "in.jsonl", tmp_path / "out.jsonl", 3, Sampling(), 0, 9, 2, 64)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("output", ["/dev/full", "."])
def test_an_output_that_is_no_file_is_refused_and_not_read(generator, source, output):
    """/dev/full has no end."""
    with pytest.raises(ValueError, match="^.* is no file, which OUT must be, as its whole lines are kept: give another output$"):
        continue_prompts(generator, source, Path(output), 3, Sampling(), 0, 9, 2, 64)


def test_an_output_that_another_process_writes_or_the_disk_refuses_is_left_alone(generator, source, tmp_path, monkeypatch):
    """Two would both write the lines that neither found there."""
    output = tmp_path / "out.jsonl"
    with claimed(output), pytest.raises(ValueError, match="^.*out.jsonl is being written by another process: wait for its end, or"):
        continue_prompts(generator, source, output, 3, Sampling(), 0, 2, 2, 64)
    with pytest.raises(ValueError, match="^.*missing/out.jsonl cannot be written .No such file or directory.: see to its disk and folder"):
        continue_prompts(generator, source, tmp_path / "missing/out.jsonl", 3, Sampling(), 0, 2, 2, 64)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rdtrain.model.text_batches.os.fsync", full)
    with pytest.raises(ValueError, match="^.*out.jsonl cannot be written .No space left on device.: .* which keeps its whole lines$"):
        continue_prompts(generator, source, output, 3, Sampling(), 0, 2, 2, 64)


def test_a_file_of_prompts_from_windows_is_read(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "The"}\r\n{"prompt": "A"}\r\n\r\n')
    assert read_prompts(tmp_path / "in.jsonl", 3) == [("The", 3), ("A", 4)]


def test_a_file_that_is_no_output_of_these_prompts_stays_as_it_is(generator, tmp_path):
    """IN itself, which lacks its last line end, among them: what looks like half a line is cut off only where it begins as ours do."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "The"}')
    with pytest.raises(ValueError, match="^line 1 of .*in.jsonl is of another prompt"):
        continue_prompts(generator, source, source, 3, Sampling(), 0, 9, 2, 64)
    assert source.read_text() == '{"prompt": "The"}'


def test_a_conversation_goes_on_from_turn_to_turn_and_back(generator, capsys):
    console, tokenizer = Console(generator, 2, Sampling(), 4, 6, 64), generator.tokenizer

    def said(line):
        console.command(line) if line.startswith(":") else console.turn(line)
        return capsys.readouterr().out

    def anew(ids, iterations, sampling):
        """What follows tokens whose cache is empty."""
        decoder = generator.decoder(1, 64, iterations, sampling)
        return "".join(text for _, text in generator.write(decoder, ids, 4, 6)) + "\n"

    first = said("The")
    assert first == "".join(generator.stream("The", 6, 2, Sampling(), 4)) + "\n"
    held, place = console.ids.copy(), console._decoder.length
    second = said(" next")
    assert console._decoder.length == place + 1 + len(tokenizer.encode(" next")) + 5, "the turn before was not read again"
    assert said(":undo") == "" and console.ids == held and said(" next") == second
    said(":temperature 0"), said(":k 3")
    text = console.ids + tokenizer.encode(" more")
    assert said(" more") == anew(text, 3, Sampling(temperature=0)) and console.ids[: len(text)] == text
    assert "temperature 0.0" in (settings := said(":settings")) and "k 3" in settings and "MiB" in settings
    said(":reset"), said(":temperature 1"), said(":k 2")
    assert said("The") == first and said(":text") == "The" + first


def test_nothing_of_a_turn_that_was_undone_stays_in_the_cache(generator):
    """A position's iterations know the token behind it: the last one of the turn before is read anew."""
    straight, astray = (Console(generator, 3, Sampling(), 4, 6, 64) for _ in range(2))
    straight.turn("The"), astray.turn("The")
    astray.turn(" list of"), astray.command(":undo")
    straight.turn(" next"), astray.turn(" next")
    assert straight.ids == astray.ids
    length = straight._decoder.length
    for one, other in zip(straight._decoder.cache._stores, astray._decoder.cache._stores):
        assert torch.equal(one[0][..., :length, :], other[0][..., :length, :])


def test_a_conversation_survives_what_is_wrong_in_it(generator, monkeypatch, capsys):
    wrong = {
        ":k 0": ":k must be at least 1, and it is 0", ":k x": ":k needs a whole number, and was given x", ":top_p 2": "top_p must lie in",
        ":nonsense": "there is no command :nonsense", ":undo": "there is no turn to undo", "\udcff": "lone surrogate U+DCFF",
        "x " * 80: "longer than the 64 that the cache holds", ":chain-readout core": "needs a model that was trained with",
    }
    typed = "\n".join([*wrong, "The", ":quit", "not read"]).encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    Console(generator, 2, Sampling(), 4, 6, 64).run()
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == len(wrong)
    assert all(sentence in line for sentence, line in zip(wrong.values(), err.splitlines()))
    assert out.endswith("".join(generator.stream("The", 6, 2, Sampling(), 4)) + "\n")


def test_a_conversation_survives_too_little_memory_and_has_room_for_a_position(generator, monkeypatch, capsys):
    def none_left(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(generator, "decoder", none_left)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The\n:text\n"), encoding="utf-8"))
    Console(generator, 2, Sampling(), 4, 6, 64).run()
    out, err = capsys.readouterr()
    assert err.startswith("there is not enough memory for the key-value cache: choose") and err.count("\n") == 1 and out == "\n"
    with pytest.raises(ValueError, match="^--context must be at least 1, and it is 0$"):
        Console(generator, 2, Sampling(), 4, 6, 0)
