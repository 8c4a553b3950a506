"""Every kind of file gives its texts exactly, and every bad input is named in one sentence."""

import gzip
import json
import lzma
import os
import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rdtrain.data.sources import list_files, read_documents, read_located_documents

TEXTS = ["first\nline\n\n", "  \u2581 spaces \t \U0001f600 \u2028 \x85 \x0c\n", "last, no line end"]
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def read(*paths, **options):
    return list(read_documents(paths, **options))


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", [".txt", ".md", ".rst"])
def test_text_files(tmp_path, ending, packing):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}{ending}{packing}").write_bytes(PACKERS[packing](text.encode()))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_lines(tmp_path, ending, packing):
    (tmp_path / f"a{ending}{packing}").write_bytes(PACKERS[packing](LINES))
    assert read(tmp_path / f"a{ending}{packing}") == TEXTS


@pytest.mark.parametrize("content", [[{"text": text} for text in TEXTS], TEXTS])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists(tmp_path, content, indent):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert read(tmp_path / "a.json") == TEXTS


def test_json_texts_keep_every_character(tmp_path):
    text = "\ufeffa\r\nb\rc\0"
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps({"text": text}) + "\r\n\n" + json.dumps({"text": None}))
    assert read(tmp_path / "a.jsonl") == [text]


def test_columns_nobody_asked_for_may_change_their_type(tmp_path):
    rows = [{"body": "a", "meta": None}, {"body": "b", "meta": {"x": 1}}, {"body": "2024-01-01", "meta": "text"}, {"body": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl", column="body") == ["a", "b", "2024-01-01", "c"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, kind):
    texts = pyarrow.array([*TEXTS, None, "a\r\nb\0"], kind)
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3, 4, 5], "text": texts}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path) == [*TEXTS, "a\r\nb\0"]


def test_line_ends_and_byte_order_mark_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\n")
    assert read(tmp_path / "a.txt") == ["a\nb\nc\n\n"]


def test_folders_globs_and_strange_names(tmp_path):
    for name in ("b/2.txt", "b/1.md", "a[1]*.txt", ".hidden/x.txt", "picture.png", "b/empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    assert read(tmp_path) == ["a[1]*.txt", "b/1.md", "b/2.txt"]
    assert read(tmp_path / "b" / "*.md", tmp_path / "b", tmp_path / "b/2.txt") == ["b/1.md", "b/2.txt"]
    assert read(tmp_path / "a[1]*.txt") == ["a[1]*.txt"]
    assert list_files([tmp_path / "**" / "?.txt"]) == [tmp_path / "b/2.txt"]


def test_links_are_followed_once_and_what_is_left_out_is_told(tmp_path, capsys, fault):
    for name in ("a/1.txt", "elsewhere/2.txt", "a/3.csv", "a/4.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, target in (("link", "../elsewhere"), ("other", "../elsewhere"), ("circle", "..")):
        (tmp_path / "a" / name).symlink_to(target)
    assert read(tmp_path / "a") == ["a/1.txt", "elsewhere/2.txt"]
    assert f"files of other kinds in {tmp_path}/a are left out: 2, the first is {tmp_path}/a/3.csv" in capsys.readouterr().err
    (tmp_path / "elsewhere" / "gone.txt").symlink_to("nowhere")
    assert "gone.txt (" in fault(lambda: read(tmp_path / "a"))
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is a pipe or a device" in fault(lambda: read(tmp_path / "pipe.txt"))


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch, fault):
    (tmp_path / "a" / "closed").mkdir(parents=True)
    (tmp_path / "a" / "1.txt").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, to whom nothing is closed
    assert f"cannot read {tmp_path}/a/closed (Permission denied)" in fault(lambda: read(tmp_path / "a"))


def test_zstandard_with_the_longest_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(LINES) + frame.flush())
    assert read(tmp_path) == TEXTS


def test_sources_and_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("y")
    documents = list(read_located_documents([tmp_path]))
    assert documents == [(f"{tmp_path}/a.jsonl:2", "x"), (f"{tmp_path}/b.txt", "y")]


def test_nothing_is_fetched_and_nothing_is_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.txt").write_text("x")
    assert read(tmp_path / "a.txt") == ["x"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name, content, message", [
    ("none/x.txt", None, "no such file or folder: "),
    ("*.none", None, "no such file or folder: "),
    ("a.pdf", b"x", "is of no known kind"),
    ("a.parquet.gz", b"x", "is of no known kind"),
    ("noending", b"x", "is of no known kind"),
    ("a.txt", b"", "no text in"),
    ("a.jsonl", b"", "no text in"),
    ("a.jsonl.gz", b"", "(the file is empty)"),
    ("a\0.txt", None, "no such file or folder: "),
    ("a.txt", b" \n\n", "no text in"),
    ("a.jsonl", b"\n", "no text in"),
    ("a.txt", b"\x80abc", "binary file or not UTF-8"),
    ("a.txt", b"a\0b", "binary file (it holds NUL bytes)"),
    ("a.jsonl", b"\x80", "binary file or not UTF-8"),
    ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "it may be damaged"),
    ("a.txt.xz", lzma.compress(b"text " * 99)[:-9], "it may be damaged"),
    ("a.txt.zst", zstandard.compress(b"text " * 99)[:-9], "it may be damaged"),
    ("a.txt.zst", b"hello", "it may be damaged"),
    ("a.jsonl.gz", b"hello", "it may be damaged"),
    ("a.parquet", b"hello", "it may be damaged"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 of "),
    ("a.json", b'[\n{"text": "a"},\n{"text": \n]', "line 4 of "),
    ("a.json", b'{"text": "a"}\nx', "line 2 of "),
    ("a.jsonl", b'{"body": "a", "id": 1}', "has no column 'text'; name the one that holds the text (there are: body, id)"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}', "a.jsonl:2 has int, not text"),
    ("a.jsonl", b'{"text": "a"}\n[1]', "a.jsonl:2 is not an object"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1 has a lone surrogate"),
])
def test_faults(tmp_path, fault, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = fault(lambda: read(tmp_path / name))
    assert message in text and name.split("/")[0] in text


def test_parquet_and_folder_faults(tmp_path, fault):
    assert "no readable files in" in fault(lambda: read(tmp_path))
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), file)
    assert "(there are: body, id)" in fault(lambda: read(file))
    assert "has int, not text" in fault(lambda: read(file, column="id"))
    file.write_bytes(file.read_bytes()[:-20])
    assert "it may be damaged" in fault(lambda: read(file))
