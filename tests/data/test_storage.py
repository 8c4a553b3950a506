"""Shards in a folder, a zip file and behind URLs: the same tokens, and damage, refusals and copies that stop halfway are all noticed."""

import concurrent.futures
import multiprocessing
import pickle
import subprocess
import sys
import zipfile

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rdtrain.config import load_config
from rdtrain.data import copying, storage
from rdtrain.data.copying import copy_shards
from rdtrain.data.inspection import inspect_shards
from rdtrain.data.sharding import write_shards
from rdtrain.data.shards import ShardReader, shard_folders
from rdtrain.data.storage import open_files
from rdtrain.distributed import World
from rdtrain.preparation import Plan

KINDS = ("folder", "file", "memory", "zip", "zip in memory")


@pytest.fixture(scope="module")
def shards(text_folder, tokenizer, tmp_path_factory):
    """Small shards of both sides."""
    folder = tmp_path_factory.mktemp("stored") / "shards"
    write_shards([text_folder], tokenizer, folder, shard_tokens=8000, validation_share=0.3)
    return folder


@pytest.fixture
def place(shards, tmp_path):
    """Copies the shards to a place of some kind, and returns it."""
    memory = fsspec.filesystem("memory")

    def make(kind):
        targets = {"folder": f"{tmp_path}/copy", "file": f"file://{tmp_path}/copy", "memory": "memory://copy"}
        target = targets.get(kind, f"{tmp_path}/copy.zip")
        copy_shards(str(shards), target)
        if kind != "zip in memory":
            return target
        memory.pipe_file("/copy.zip", (tmp_path / "copy.zip").read_bytes())
        return "memory://copy.zip"

    yield make
    memory.store.clear()


def change(place, name, edit):
    """Has `edit` change the content of a file, a bytearray; a file that is left empty is deleted."""
    archive, zipped, inside = place.partition(".zip/")
    system, path = fsspec.core.url_to_fs(archive + ".zip" if zipped else f"{place}/{name}")
    content = bytearray(system.cat_file(path))
    if not zipped:
        edit(content)
    else:
        with system.open(path) as stream, zipfile.ZipFile(stream) as members:
            member = members.getinfo(f"{inside}/{name}")
        begin = member.header_offset + 30 + len(member.filename)
        part = content[begin:begin + member.file_size]
        edit(part)
        content[begin:begin + len(part)] = part
    system.pipe_file(path, bytes(content)) if content else system.rm_file(path)


def flip(content):
    content[len(content) // 2] ^= 4


def tokens_of(reader):
    return reader.read(0, len(reader)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_and_the_same_damage_wherever_they_lie(shards, place, tokenizer, fault, kind):
    location = place(kind)
    assert shard_folders(location) == [f"{location}/train", f"{location}/validation"]
    expected, reader = ShardReader(shards / "train"), ShardReader(f"{location}/train", tokenizer.hash)
    tokens = tokens_of(expected)
    assert tokens_of(reader) == tokens and reader.documents.tolist() == expected.documents.tolist()
    assert reader.manifest == expected.manifest and not list(reader.find_damage())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        starts = np.random.default_rng(0).integers(0, len(reader) - 900, 40).tolist()
        assert [part.tolist() for part in pool.map(lambda start: reader.read(start, start + 900), starts)] == [
            tokens[start:start + 900] for start in starts]
    assert tokens_of(pickle.loads(pickle.dumps(reader))) == tokens
    report = inspect_shards(f"{location}/train", document=1, length=50)
    assert report.replace(f"{location}/train", str(shards / "train")) == inspect_shards(shards / "train", document=1, length=50)

    change(f"{location}/train", "arrays.zarr/tokens/c/1", flip)
    assert list(reader.find_damage()) == [f"{location}/train/arrays.zarr/tokens/c/1 is damaged (its checksum is wrong)"]
    assert "tokens/c/1 is damaged" in fault(lambda: reader.read(7000, 9000))
    reader.read(0, 8000)
    change(f"{location}/train", "tokenizer.model", flip)
    assert "tokenizer.model is damaged" in fault(lambda: reader.read_file("tokenizer.model"))
    if "zip" not in kind:
        change(f"{location}/train", "arrays.zarr/tokens/c/0", bytearray.clear)
        assert "tokens/c/0 is missing" in fault(lambda: reader.read(0, 9)), "zarr itself would read zeros"
        assert "tokens/c/0 is missing" in fault(lambda: ShardReader(f"{location}/train"))
        change(f"{location}/train", "arrays.zarr/documents/c/0", bytearray.pop)
        found = [text.removeprefix(f"{location}/train/").split(" (")[0] for text in reader.find_damage()]
        size = reader.manifest["files"]["arrays.zarr/documents/c/0"]["bytes"]
        assert found == ["arrays.zarr/tokens/c/0 is missing", "arrays.zarr/tokens/c/1 is damaged",
                         f"arrays.zarr/documents/c/0 has {size - 1} bytes, not {size}", "tokenizer.model is damaged"]
    change(f"{location}/validation", "manifest.json", flip)
    assert "manifest.json is damaged" in fault(lambda: ShardReader(f"{location}/validation"))


def _first_tokens(reader):
    return reader.read(0, 100).tolist()


OTHER_PROCESS = """
import concurrent.futures, multiprocessing, sys
from rdtrain.data.shards import ShardReader

if __name__ == "__main__":
    reader = ShardReader(sys.argv[1])
    expected = reader.read(0, 100).tolist()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[2])) as pool:
        assert pool.submit(reader.read, 0, 100).result().tolist() == expected
"""


@pytest.mark.parametrize(("kind", "start"), [("file", "fork"), ("zip", "spawn")])
def test_readers_go_into_other_processes(place, tmp_path, kind, start):
    """From a process of its own: not every library that other tests have started lets itself be forked."""
    script = tmp_path / "script.py"
    script.write_text(OTHER_PROCESS)
    subprocess.run([sys.executable, script, f"{place(kind)}/train", start], check=True, timeout=600)


def test_a_store_that_refuses_for_a_while_is_asked_again(place, monkeypatch, capsys, fault):
    reader = ShardReader(f"{place('memory')}/train")
    answers, pauses, ask = [], [], MemoryFileSystem.cat_file

    def cat_file(self, path, **limits):
        if not answers:
            return ask(self, path, **limits)
        if isinstance(answers[-1], bytes):
            return answers.pop()
        raise answers.pop()

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    expected = _first_tokens(reader)
    answers += [TimeoutError(), OSError("SlowDown\nmore"), ConnectionResetError("reset")]
    assert _first_tokens(reader) == expected and pauses == [1, 2, 4]
    text = capsys.readouterr().err
    assert "tokens/c/0 cannot be reached (SlowDown); trying again in 2 s" in text and "(TimeoutError); trying again in 4 s" in text
    answers += [b"short"]
    assert _first_tokens(reader) == expected and pauses.pop() == 1 and "5 bytes came instead of" in capsys.readouterr().err
    answers += [OSError("SlowDown")] * 7
    assert "cannot be reached (SlowDown), after 7 tries; see to the network" in fault(lambda: _first_tokens(reader))
    assert pauses[3:] == [1, 2, 4, 8, 16, 32] and not answers
    answers += [PermissionError("AccessDenied")]
    assert "is forbidden (AccessDenied); give" in fault(lambda: _first_tokens(reader)) and len(pauses) == 9
    answers += [OSError("no route")] * 3
    assert "after 3 tries" in fault(lambda: ShardReader("memory://copy/train"))


def test_a_copy_that_was_stopped_is_none_until_it_is_continued(shards, monkeypatch, fault, place):
    location = "memory://copy"
    written, write = [], MemoryFileSystem.pipe_file

    def pipe_file(self, path, value, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(self, path, value, **options)

    monkeypatch.setattr(copying, "FILES_AT_ONCE", 1)
    with monkeypatch.context() as stopping:
        stopping.setattr(MemoryFileSystem, "pipe_file", pipe_file)
        with pytest.raises(KeyboardInterrupt):
            copy_shards(str(shards), location)
    assert "no shards in" in fault(lambda: ShardReader(f"{location}/train"))
    change(f"{location}/train", written[0].removeprefix("/copy/train/"), flip)
    before = set(written)
    written = ["", *written]  # never 4 again
    with monkeypatch.context() as continuing:
        continuing.setattr(MemoryFileSystem, "pipe_file", pipe_file)
        copy_shards(str(shards), location)
    again = written[5:]
    assert set(again) & before == {again[0]} == {written[1]}, "what was whole is left"
    assert [path.endswith("manifest.json") for path in again].count(True) == 2 and again[-1] == "/copy/validation/manifest.json"
    assert not [*ShardReader(f"{location}/train").find_damage(), *ShardReader(f"{location}/validation").find_damage()]


def test_copies_are_refused_that_would_be_wrong(shards, place, text_folder, tokenizer, tmp_path, monkeypatch, fault):
    location = place("memory")
    write_shards([text_folder / "0.txt"], tokenizer, tmp_path / "other")
    other, target = str(tmp_path / "other"), f"{location}/train"
    assert "holds other shards; choose" in fault(lambda: copy_shards(other, target))
    assert ShardReader(copy_shards(other, target, overwrite=True)[0].path).document_count == 1
    assert "straight to memory://x.zip" in fault(lambda: copy_shards(other, "memory://x.zip"))
    copy_shards(other, str(tmp_path / "x.zip"))
    first = (tmp_path / "x.zip").read_bytes()
    assert "exists already; choose" in fault(lambda: copy_shards(other, str(tmp_path / "x.zip")))
    copy_shards(other, str(tmp_path / "x.zip"), overwrite=True)
    assert (tmp_path / "x.zip").read_bytes() == first
    (tmp_path / "text.zip").write_text("a text")
    assert "it is no zip file" in fault(lambda: copy_shards(other, str(tmp_path / "text.zip"), overwrite=True))
    change(other, "arrays.zarr/tokens/c/0", flip)
    for target in ("memory://new", str(tmp_path / "new.zip")):
        assert f"{other}/arrays.zarr/tokens/c/0 is damaged" in fault(lambda target=target: copy_shards(other, target))
        assert "no shards" in fault(lambda target=target: ShardReader(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "text.zip", "x.zip"]
    write = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, **options: write(self, path, value[:-1], **options))
    assert "does not hold what was written to it" in fault(lambda: copy_shards(str(shards), "memory://lost"))


def test_zip_files_that_cannot_be_read(shards, tmp_path, fault):
    for name, packing in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", packing) as archive:
            for file in shards.rglob("*"):
                archive.write(file, f"deep/{file.relative_to(shards)}")
    assert tokens_of(ShardReader(tmp_path / "stored.zip/deep/train")) == tokens_of(ShardReader(shards / "train"))
    assert "packed.zip holds compressed" in fault(lambda: ShardReader(tmp_path / "packed.zip/deep/train"))
    content = (tmp_path / "stored.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    assert "cut.zip is damaged or no zip file" in fault(lambda: ShardReader(tmp_path / "cut.zip"))
    place = content.index(b"deep/train/arrays.zarr/tokens/c/0") - 30
    (tmp_path / "stored.zip").write_bytes(content[:place] + b"X" + content[place + 1:])
    reader = ShardReader(tmp_path / "stored.zip/deep/train")
    assert "c/0 cannot be read (its header in the zip file is damaged)" in fault(lambda: reader.read(0, 9))
    assert len(list(reader.find_damage())) == 1
    assert "there is no zip file memory://none.zip" in fault(lambda: ShardReader("memory://none.zip"))


def test_urls_of_unknown_kinds(fault):
    fsspec.register_implementation("unpacked", "no_such_package.System", errtxt="Install no_such_package", clobber=True)
    assert "unpacked://x cannot be opened (Install no_such_package); install that" in fault(lambda: open_files("unpacked://x"))
    assert "nothing://x cannot be opened (Protocol not known: nothing); give" in fault(lambda: open_files("nothing://x"))


def test_training_and_its_checkpoints_take_them(place, tiny_config):
    zipped, memory = place("zip"), place("memory")
    config = load_config(tiny_config(data={"train": f"{zipped}/train", "validation": f"{memory}/validation"}), [])
    plan = Plan.make(config, World.from_environment())
    assert plan.tokenizer == {"tokenizer.model": ShardReader(f"{memory}/train").read_file("tokenizer.model")}
    assert plan.loader.batch(range(3)).shape == (3, 17)


@pytest.mark.slow
def test_a_server_that_speaks_s3(shards, tmp_path, monkeypatch, fault):
    """Needs `pip install s3fs moto[server]`."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("ENDPOINT_URL", f"http://{host}:{port}")):
            monkeypatch.setenv(f"AWS_{name}", value)
        assert "or create the bucket" in fault(lambda: copy_shards(str(shards), "s3://none/shards"))
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        reader = copy_shards(str(shards), "s3://bucket/shards")[0]
        assert tokens_of(reader) == tokens_of(ShardReader(shards / "train"))
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            assert pool.submit(reader.read, 0, 100).result().tolist() == _first_tokens(reader)
        copy_shards("s3://bucket/shards", str(tmp_path / "back.zip"))
        system.put_file(tmp_path / "back.zip", "bucket/back.zip")
        assert tokens_of(ShardReader("s3://bucket/back.zip/train")) == tokens_of(reader)
        change("s3://bucket/shards/train", "arrays.zarr/tokens/c/1", flip)
        assert "tokens/c/1 is damaged" in fault(lambda: reader.read(7000, 9000))
        assert len(list(reader.find_damage())) == 1
        system.rm_file("bucket/shards/train/arrays.zarr/tokens/c/0")
        assert "tokens/c/0 is missing" in fault(lambda: ShardReader("s3://bucket/shards/train"))
    finally:
        server.stop()
