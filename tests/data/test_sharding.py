"""Whatever the workers, units, parts and kills: each text once, in the order of the input, on the side that its hash gives it."""

import gzip
import hashlib
import io
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from rdtrain.data import deduplication, reading, units
from rdtrain.data.encoding import SEGMENT_CHARACTERS, segments
from rdtrain.data.sharding import merge_parts, write_shards
from rdtrain.data.sharding_benchmark import benchmark
from rdtrain.data.shards import ShardReader
from rdtrain.data.units import Inputs, NamedSource, load_sources


def parquet(columns):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def expected(documents, tokenizer, share=0.0):
    """(training tokens, validation tokens) by a plain loop."""
    sides, seen = ([], []), set()
    for text in documents:
        if text.strip() and text not in seen:
            seen.add(text)
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big")
            sides[number < share * 2**64].append(tokenizer.encode(text, bos=True, eos=True))
    return sides


def assert_holds(folder, documents):
    reader = ShardReader(folder)
    assert reader.read(0, len(reader)).tolist() == [token for ids in documents for token in ids]
    assert reader.documents.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert len(reader) == sum(map(len, documents)) and reader.document_count == len(documents)
    reader.verify()


@pytest.mark.parametrize(("unit_bytes", "workers"), [(700, 1), (4000, 2), (1 << 23, 1)])
def test_the_result_depends_neither_on_units_nor_on_workers(mixed, documents, tokenizer, tmp_path, monkeypatch, unit_bytes, workers):
    monkeypatch.setattr(reading, "READ_BYTES", 100)
    monkeypatch.setattr(deduplication, "BUCKET_DOCUMENTS", 100)
    manifest = write_shards([mixed], tokenizer, tmp_path / "shards", 3000, validation_share=0.2, workers=workers, unit_bytes=unit_bytes)
    train, validation = expected(documents, tokenizer, 0.2)
    assert_holds(tmp_path / "shards" / "train", train)
    assert_holds(tmp_path / "shards" / "validation", validation)
    assert len(validation) > 50
    left_out = manifest["sources"][0]["left_out"]
    copies = sum(map(bool, map(str.strip, documents))) - len(train) - len(validation)
    assert left_out["empty"]["documents"] == 2 and left_out["duplicate"]["documents"] == copies >= 2
    assert sorted(os.listdir(tmp_path)) == ["shards"]


def test_parts_merge_into_what_one_run_writes(mixed, tokenizer, tmp_path, fault, content):
    options = {"shard_tokens": 3000, "validation_share": 0.2, "unit_bytes": 700}
    write_shards([mixed], tokenizer, tmp_path / "whole", **options)
    parts = [tmp_path / f"part{number}" for number in (3, 1, 2)]
    for number, part in zip((3, 1, 2), parts):
        write_shards([mixed], tokenizer, part, part=(number, 3), **options)
    assert "number 2 is not given" in fault(lambda: merge_parts(parts[:2], tmp_path / "merged"))
    merge_parts(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    write_shards([mixed], tokenizer, tmp_path / "other", part=(2, 3), **{**options, "validation_share": 0.1})
    assert "other validation_share" in fault(lambda: merge_parts([*parts[:2], tmp_path / "other"], tmp_path / "x"))
    write_shards([mixed], tokenizer, tmp_path / "fourth", part=(2, 4), **options)
    assert "fourth is part 2 of 4, and " in fault(lambda: merge_parts([*parts, tmp_path / "fourth"], tmp_path / "x"))
    damaged = next(parts[1].rglob("*.tokens"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert f"{damaged} is damaged" in fault(lambda: merge_parts(parts, tmp_path / "x"))
    assert "no part that" in fault(lambda: merge_parts([tmp_path], tmp_path / "x"))
    for number in (1, 2):  # of which one has nothing to do
        write_shards([mixed / "f.json"], tokenizer, tmp_path / f"small{number}", part=(number, 2))
    assert merge_parts([tmp_path / "small1", tmp_path / "small2"], tmp_path / "small")["documents"] > 0
    (tmp_path / "small1" / "tokenizer.model").unlink()
    assert "small1 is missing or damaged" in fault(lambda: merge_parts([tmp_path / "small1", tmp_path / "small2"], tmp_path / "x"))


def test_the_validation_side_stays_when_data_are_added(documents, tokenizer, tmp_path, lines):
    (tmp_path / "a.jsonl").write_bytes(lines(documents[:200]))
    write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "few", validation_share=0.2)
    (tmp_path / "0.jsonl").write_bytes(lines(documents[200:]))
    write_shards([tmp_path / "0.jsonl", tmp_path / "a.jsonl"], tokenizer, tmp_path / "more", validation_share=0.2)

    def texts(side):
        reader = ShardReader(tmp_path / side)
        return {tokenizer.decode(part.tolist()) for part in np.split(reader.read(0, len(reader)), reader.documents[1:-1])}

    assert texts("few/train") < texts("more/train") and texts("few/validation") < texts("more/validation")


def test_sources_by_name(documents, tokenizer, tmp_path, monkeypatch, fault, lines):
    pyarrow.parquet.write_table(pyarrow.table({"body": documents[:50]}), tmp_path / "train-00000.parquet")
    (tmp_path / "set").mkdir()
    shutil.move(tmp_path / "train-00000.parquet", tmp_path / "set")
    (tmp_path / "a.jsonl").write_bytes(lines(documents[50:90]))
    config = tmp_path / "sources.yaml"
    config.write_text(yaml.safe_dump({"sources": {
        "hub": {"dataset": str(tmp_path / "set"), "column": "body"}, "files": {"paths": [str(tmp_path / "*.jsonl")]},
        "piped": {"paths": ["-"], "standard_input": "lines"}}}, sort_keys=False))
    stream = io.BytesIO(b"first line\nsecond line\r\n\nfirst line\nlast line")
    monkeypatch.setattr(sys, "stdin", type("Standard", (), {"buffer": stream}))
    manifest = write_shards(load_sources(config), tokenizer, tmp_path / "shards", unit_bytes=1000)
    assert_holds(tmp_path / "shards", expected([*documents[:90], "first line", "second line", "last line"], tokenizer)[0])
    places = [(source["name"], source["first_document"], source["documents"]) for source in manifest["sources"]]
    kept = [len(set(filter(str.strip, part))) for part in (documents[:50], documents[:90])]
    assert places == [("hub", 0, kept[0]), ("files", kept[0], kept[1] - kept[0]), ("piped", kept[1], 3)]
    assert manifest["sources"][2]["left_out"] == {"duplicate": {"documents": 1, "first": "standard input:4"},
                                                  "empty": {"documents": 1, "first": "standard input:3"}}
    for text, message in (("sources: {a: {}}", "either paths or a dataset"), ("x: 1", "holds no sources"), ("[", "is not YAML"),
                          ("sources: {a: {paths: [2024-02-30]}}", "is not YAML (day is out of range for month)"),
                          ("sources: {a: {paths: [x]}, a: {paths: [y]}}", "'a' stands twice"),
                          ("sources: {a: {paths: x}}", "needs a list"), ("sources: {a: {path: [x]}}", "unknown settings (path)")):
        config.write_text(text)
        assert message in fault(lambda: load_sources(config))
    missing = [NamedSource("x", dataset=str(tmp_path / "none"))]
    assert "cannot read the data set" in fault(lambda: write_shards(missing, tokenizer, tmp_path / "x"))
    datasets.DatasetDict({"some": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "saved")
    other = [NamedSource("x", dataset=str(tmp_path / "saved"))]
    assert "has no split 'train'; name one of some" in fault(lambda: write_shards(other, tokenizer, tmp_path / "x"))
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in fault(lambda: write_shards(["-"], tokenizer, tmp_path / "x"))
    assert write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "x")["documents"] > 0, "nothing had been done with other settings"


TWO = b'{"text": "good"}\n{"text": "end"}\n'
BAD = [
    ("a.jsonl", b'{"text": "good"}\n{"text": "b\xff"}\n{"text": "a\\ud800"}\n\0\0\n{"text": 5}\n{"body": 1}\n[1]\n{"text": "x"\n'
     + b"[" * 20000 + b'\n{"text": null}\n{"text": "end"}',
     {"not UTF-8": (1, "a.jsonl:2"), "lone surrogate": (1, "a.jsonl:3"), "not JSON": (3, "a.jsonl:4"), "not text": (1, "a.jsonl:5"),
      "no column": (1, "a.jsonl:6"), "not an object": (1, "a.jsonl:7"), "empty": (1, "a.jsonl:10")}),
    ("b.jsonl.gz", gzip.compress(TWO + b" " * 9, mtime=0)[:-9], {"unreadable": (1, "b.jsonl.gz:3")}),
    ("c.txt.zst", zstandard.compress(b"text" * 99)[:-5], {"unreadable": (1, "c.txt.zst")}),
    ("d.txt", b"a\0b", {"binary": (1, "d.txt")}),
    ("e.txt", b"\xff\xfe", {"not UTF-8": (1, "e.txt")}),
    ("f.parquet", b"PAR1", {"unreadable": (1, "f.parquet:1")}),
    ("g.json", b'[{"text": "x"},', {"not JSON": (1, "g.json:1")}),
    ("h.jsonl.xz", lzma.compress(TWO + b" " * 9)[:-20], {"unreadable": (1, "h.jsonl.xz:3")}),
    ("i.jsonl.gz", b"not packed", {"unreadable": (1, "i.jsonl.gz:1")}),
    ("j.parquet", parquet({"text": [5, None, 7]}), {"empty": (1, "j.parquet:2"), "not text": (2, "j.parquet:1")}),
    ("k.parquet", parquet({"text": ["x"] * 999})[:-9], {"unreadable": (1, "k.parquet:1")}),
    ("l.jsonl", b"", {"empty": (1, "l.jsonl")}),
    ("m.txt", b"", {"empty": (1, "m.txt")}),
    ("n.jsonl.gz", b"", {"unreadable": (1, "n.jsonl.gz:1")}),
    ("o.txt.gz", b"", {"unreadable": (1, "o.txt.gz")}),
    ("p.parquet", b"", {"unreadable": (1, "p.parquet:1")}),
    ("q.parquet", parquet({"text": [{"body": "x"}, None]}), {"not text": (1, "q.parquet:1"), "empty": (1, "q.parquet:2")}),
    ("r.jsonl.gz", gzip.compress(TWO[:20], mtime=0) + gzip.compress(TWO[20:], mtime=0) + b"more", {"unreadable": (1, "r.jsonl.gz:3")}),
    ("s.jsonl", '{"text": "x"}\n'.encode("utf-16"), {"not UTF-8": (1, "s.jsonl:1"), "not JSON": (1, "s.jsonl:2")}),
]


@pytest.mark.parametrize("unit_bytes", [400, 1 << 23])
@pytest.mark.parametrize(("name", "damage", "reasons"), BAD, ids=[name for name, _, _ in BAD])
def test_what_cannot_be_read_is_counted_and_named(tokenizer, tmp_path, unit_bytes, name, damage, reasons):
    (tmp_path / "0.txt").write_text("whole")
    (tmp_path / name).write_bytes(damage)
    manifest = write_shards([tmp_path], tokenizer, tmp_path / "out", unit_bytes=unit_bytes)
    good = ["whole", *(["good", "end"] if b"good" in damage or name in ("b.jsonl.gz", "h.jsonl.xz", "r.jsonl.gz") else [])]
    assert_holds(tmp_path / "out", expected(good, tokenizer)[0])
    found = {reason: (facts["documents"], Path(facts["first"].split(" (")[0]).name)
             for reason, facts in manifest["sources"][0]["left_out"].items()}
    assert found == reasons


@pytest.mark.parametrize("cases", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_random_damage_is_never_a_crash(tokenizer, mixed, tmp_path, monkeypatch, cases):
    """And never read in another way when the units are others."""
    monkeypatch.setattr(reading, "READ_BYTES", 300)
    draw = random.Random(cases)
    for number in range(cases):
        original = draw.choice([file for file in sorted(mixed.iterdir()) if file.suffix != ".txt"])
        damaged = bytearray(original.read_bytes())
        for _ in range(draw.randrange(1, 30)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        del damaged[draw.randrange(len(damaged) // 2, len(damaged) + 1):]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / original.name).write_bytes(damaged)
        (folder / "0.txt").write_text("whole")
        manifest, other = (write_shards([folder], tokenizer, tmp_path / "out", unit_bytes=unit_bytes, overwrite=True)
                           for unit_bytes in (draw.choice((500, 5000)), 1 << 23))
        assert manifest["files"] == other["files"] and manifest["documents"] >= 1
        counts, others = ({reason: facts["documents"] for reason, facts in facts["sources"][0]["left_out"].items()}
                          for facts in (manifest, other))
        assert counts == others and manifest["documents"] + sum(counts.values()) >= 2


def test_wrong_columns_and_nothing_to_read(tokenizer, tmp_path, fault):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "a.parquet")
    text = fault(lambda: write_shards([tmp_path], tokenizer, tmp_path / "out"))
    assert "no text in text (2 no column, the first is " in text and "a.parquet (body)" in text
    assert "out of range" in fault(lambda: write_shards([tmp_path], tokenizer, tmp_path / "out", validation_share=0.6))
    assert "no part 3/2" in fault(lambda: write_shards([tmp_path], tokenizer, tmp_path / "out", part=(3, 2)))
    assert "parts" in fault(lambda: write_shards(["-"], tokenizer, tmp_path / "out", part=(1, 2)))
    assert "validation side" in fault(lambda: write_shards([tmp_path], tokenizer, tmp_path / "out", column="body", validation_share=1e-9))
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_long_lines_and_documents_are_encoded_as_a_whole(tokenizer, texts, tmp_path, monkeypatch, lines):
    monkeypatch.setattr("rdtrain.data.encoding.SEGMENT_CHARACTERS", 100)
    monkeypatch.setattr("rdtrain.data.encoding.BATCH_CHARACTERS", 300)
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 70)
    monkeypatch.setattr(reading, "LONGEST_LINE", 5000)
    monkeypatch.setattr(units, "LONGEST_LINE", 5000)
    line = " ".join(texts[0].split()) + "     " + texts[1]
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text(line)
    (tmp_path / "c.txt").write_text(line + "\0")  # taken back after much of it has been written
    (tmp_path / "d.txt").write_text("end")
    for name, pack in (("e.jsonl", bytes), ("f.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(lines([line[:900], "x" * 6000, name])))
    manifest = write_shards([tmp_path], tokenizer, tmp_path / "out", unit_bytes=200)
    assert_holds(tmp_path / "out", expected(["short", line, "end", line[:900], "e.jsonl", "f.jsonl.gz"], tokenizer)[0])
    left_out = manifest["sources"][0]["left_out"]
    assert (left_out["binary"]["documents"], left_out["too long"]["documents"], left_out["duplicate"]["documents"]) == (1, 2, 1)
    assert left_out["too long"]["first"].startswith(f"{tmp_path}/e.jsonl:2")


def test_segments_lose_nothing():
    for text in ("x" * 3 * SEGMENT_CHARACTERS, " " * 3 * SEGMENT_CHARACTERS, "a b" * SEGMENT_CHARACTERS, ""):
        parts = list(segments(text))
        assert "".join(parts) == text and max(map(len, parts)) <= SEGMENT_CHARACTERS


def test_other_settings_or_inputs_are_not_continued(tokenizer, tmp_path, monkeypatch, fault, lines):
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "b"]))
    with monkeypatch.context() as broken:
        broken.setattr("rdtrain.data.sharding._write_result", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        assert "(no space); make room" in fault(lambda: write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out"))
    other = fault(lambda: write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", validation_share=0.1))
    assert "with other validation share;" in other
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "c"]))
    assert "inputs (they have changed" in fault(lambda: write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out"))
    shutil.rmtree(tmp_path / ".out.unfinished")
    write_shards([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_the_same_command_knows_its_own_output(tokenizer, tmp_path, capsys, fault, lines):
    """As after a kill in the last moment, when nothing is left to do; a job script may start it however often it likes."""
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_bytes(lines(["a", "b"]))
    manifest = write_shards([file], tokenizer, out)
    (tmp_path / ".out.deleted").mkdir()
    assert write_shards([file], tokenizer, out) == manifest and "has been written by this command before" in capsys.readouterr().err
    for options in ({"part": (1, 2)}, {"part": (2, 2)}):
        part = tmp_path / f"part{options['part'][0]}"
        facts = write_shards([file], tokenizer, part, unit_bytes=10, **options)
        assert write_shards([file], tokenizer, part, unit_bytes=10, **options) == facts
        assert "exists already" in fault(lambda part=part, options=options: write_shards([file], tokenizer, part, **options))
    parts = [tmp_path / "part1", tmp_path / "part2"]
    assert merge_parts(parts, tmp_path / "merged") == merge_parts(parts, tmp_path / "merged") == manifest
    assert capsys.readouterr().err.count("written by this command before") == 3
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "merged", "out", "part1", "part2"]
    assert "exists already" in fault(lambda: write_shards([file], tokenizer, out, column="body"))
    (out / "manifest.json").rename(out / "other.json")
    assert "exists already" in fault(lambda: write_shards([file], tokenizer, out))
    (out / "other.json").rename(out / "manifest.json")
    file.touch()
    assert "exists already" in fault(lambda: write_shards([file], tokenizer, out)), "the input may be another"


def test_what_is_streamed_must_be_the_same_to_continue(tokenizer, tmp_path, monkeypatch, fault, lines):
    def shard(content, fail=False):
        monkeypatch.setattr(sys, "stdin", type("Standard", (), {"buffer": io.BytesIO(content)}))
        if fail:
            monkeypatch.setattr("rdtrain.data.sharding._write_result", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        return write_shards(["-"], tokenizer, tmp_path / "out")

    with monkeypatch.context() as monkeypatch:
        fault(lambda: shard(lines(["a", "b"]), fail=True))
    assert "standard input does not give what it gave before" in fault(lambda: shard(lines(["a", "c"])))
    assert shard(lines(["a", "b"]))["documents"] == 2


def test_shards_go_into_a_folder_which_is_no_input(tokenizer, tmp_path, capsys, fault):
    (tmp_path / "a.txt").write_text("text")
    manifest = write_shards([tmp_path], tokenizer, tmp_path / "out")
    assert write_shards([tmp_path], tokenizer, tmp_path / "out") == manifest
    assert write_shards([tmp_path], tokenizer, tmp_path / "out", overwrite=True) == manifest
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to("large disk")
    (tmp_path / "new").symlink_to("none yet")
    for link in ("link", "new"):  # a link is filled, not replaced
        assert write_shards([tmp_path / "a.txt"], tokenizer, tmp_path / link)["documents"] == 1 and (tmp_path / link).is_symlink()
    for place in ("s3://bucket/shards", tmp_path / "shards.zip"):
        assert "`rdtrain shard copy`" in fault(lambda place=place: write_shards([tmp_path], tokenizer, Path(place)))


FULL_DISK = """
import pathlib, subprocess, sys
import numpy
from rdtrain.data.deduplication import sort_documents
from rdtrain.data.encoding import RECORD
folder = pathlib.Path(sys.argv[1])
numpy.zeros(200_000, RECORD).tofile(folder / "records")
(folder / "full").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder / "full"], check=True)
try:
    sort_documents([folder / "records"], 200_000, 0.1, folder / "full")
except OSError as error:
    print(error.strerror)
"""


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path):
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("a small disk cannot be made here")
    process = subprocess.run([*alone, sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "No space left on device\n"), process.stderr


def test_a_log_has_lines_of_speed_tokens_and_time_left(mixed, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rdtrain.data.progress.LINE_SECONDS", 0)
    write_shards([mixed], tokenizer, tmp_path / "out", unit_bytes=3000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5 and all(line.startswith(("shards: ", "files: ")) for line in lines), lines
    assert any(re.fullmatch(r"shards: \d\d% \S+k of \S+k, \S+ so far, \S+ left, \S+B/s, [\d,]+ tokens", line) for line in lines), lines


@pytest.mark.slow
def test_the_benchmark_measures_the_command_beside_the_tokenizer(tokenizer, tmp_path, fault):
    titles, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in
                        benchmark(tokenizer, tmp_path / "work", [1, 2], [1, 2]).splitlines())
    assert [row[:2] for row in rows] == [["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"]]
    columns = dict(zip(titles, zip(*rows)))
    assert columns["tokens"][0] == columns["tokens"][1] < columns["tokens"][2] == columns["tokens"][3]
    assert all(float(cell) > 0 for title in ("MB/s", "bare tokenizer MB/s", "bare") for cell in columns[title])
    assert all(50 < float(cell) < 1000 for cell in columns["peak memory MiB"]) and not list(tmp_path.iterdir())
    assert "exists already" in fault(lambda: benchmark(tokenizer, tmp_path, [1], [1]))


def test_units_are_the_same_each_time(mixed):
    first, again = (list(Inputs([NamedSource("a", (str(mixed),))], 700).units()) for _ in range(2))
    assert first == again and [unit.number for unit in first] == list(range(len(first)))
    assert sum(unit.input_bytes for unit in first) == pytest.approx(sum(file.stat().st_size for file in mixed.iterdir()), rel=0.02)
