"""Shards hold exactly the tokens that were written, plain zarr reads them, and every kind of damage is named."""

import argparse
import copy
import json
import random
import shutil

import matplotlib.image
import numpy as np
import pytest
import zarr

from rdtrain.data.commands import _verify
from rdtrain.data.inspection import inspect_shards
from rdtrain.data.sharding import write_shards
from rdtrain.data.shards import ShardReader
from rdtrain.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def shards(text_folder, tokenizer, tmp_path_factory):
    """Shards so small that the text fills many."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    write_shards([text_folder], tokenizer, folder, shard_tokens=1000)
    return folder


@pytest.fixture
def damaged(shards, tmp_path):
    """A copy to damage."""
    return shutil.copytree(shards, tmp_path / "damaged")


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_tokens_and_documents_come_back(shards, tokenizer, texts):
    reader = ShardReader(shards, tokenizer.hash)
    documents = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    tokens = np.concatenate(documents)
    assert len(reader) == len(tokens) > 10_000
    assert len(list((shards / "arrays.zarr/tokens/c").iterdir())) == -(-len(tokens) // 1000)
    assert np.array_equal(reader.read(0, len(reader)), tokens) and reader.read(0, 5).dtype == np.uint16
    for start, stop in ((0, 0), (999, 1001), (1000, 2000), (2999, 7001), (len(reader) - 1, len(reader))):
        assert np.array_equal(reader.read(start, stop), tokens[start:stop])
    assert reader.documents.tolist() == np.cumsum([0, *map(len, documents)]).tolist() and reader.documents.dtype == np.int64
    first, last = reader.documents[3:5]
    assert tokenizer.decode(reader.read(first, last).tolist()) == texts[3]
    assert reader.document_count == len(texts) and reader.text_bytes == sum(len(text.encode()) for text in texts)
    assert reader.bytes_per_token == reader.text_bytes / len(tokens) and reader.vocab_size == 800
    for start, stop in ((-1, 5), (5, 4), (0, len(tokens) + 1)):
        with pytest.raises(ValueError):
            reader.read(start, stop)
    reader.verify()


def test_the_same_content_is_known_as_the_same_wherever_it_lies(shards, text_folder, tokenizer, tmp_path):
    write_shards([text_folder], tokenizer, tmp_path / "again", shard_tokens=1000)
    (tmp_path / "text.txt").write_text("Another text.")
    write_shards([tmp_path / "text.txt"], tokenizer, tmp_path / "other", shard_tokens=1000)
    first, again, other = (ShardReader(path).content_hash for path in (shards, tmp_path / "again", tmp_path / "other"))
    assert first == again != other


def test_plain_zarr_reads_them(shards, tokenizer, texts):
    group = zarr.open_group(shards / "arrays.zarr", mode="r")
    start, stop = group["documents"][1:3]
    assert group["tokens"][start:stop].tolist() == tokenizer.encode(texts[1], bos=True, eos=True)


def test_the_shard_size_changes_nothing_else(shards, text_folder, tokenizer, tmp_path):
    manifest = write_shards([text_folder], tokenizer, tmp_path / "one")
    one, many = ShardReader(tmp_path / "one"), ShardReader(shards)
    assert np.array_equal(one.read(0, len(one)), many.read(0, len(many))) and np.array_equal(one.documents, many.documents)
    assert manifest == json.loads((tmp_path / "one/manifest.json").read_text()) == one.manifest
    assert Tokenizer(tmp_path / "one").hash == tokenizer.hash == manifest["tokenizer_hash"]
    again = write_shards([text_folder], tokenizer, tmp_path / "again")
    assert again == manifest, "the same input must give the same bytes"


def test_a_large_vocabulary_takes_wider_numbers(text_folder, tokenizer, tmp_path):
    large = copy.copy(tokenizer)
    large.vocab_size = 65537
    manifest = write_shards([text_folder / "0.txt"], large, tmp_path / "large")
    assert manifest["dtype"] == "uint32" and ShardReader(tmp_path / "large").read(0, 5).dtype == np.uint32


def test_output_faults(shards, text_folder, tokenizer, tmp_path, fault):
    assert "exists already" in fault(lambda: write_shards([text_folder], tokenizer, shards))
    assert "multiple of 131072" in fault(lambda: write_shards([text_folder], tokenizer, tmp_path / "x", shard_tokens=131073))
    assert "multiple of 131072" in fault(lambda: write_shards([text_folder], tokenizer, tmp_path / "x", shard_tokens=0))
    assert "no such file" in fault(lambda: write_shards([tmp_path / "none"], tokenizer, tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_overwriting(damaged, text_folder, tokenizer, texts):
    write_shards([text_folder / "0.txt"], tokenizer, damaged, overwrite=True)
    assert ShardReader(damaged).document_count == 1
    assert [file.name for file in damaged.parent.iterdir()] == ["damaged"]


def test_another_tokenizer(shards, tokenizer, fault):
    text = fault(lambda: ShardReader(shards, "0123456789abcdef"))
    assert tokenizer.hash[:12] in text and "0123456789ab" in text and "write the shards again" in text


def test_missing_and_cut_files(damaged, fault, tmp_path):
    assert "no shards in" in fault(lambda: ShardReader(tmp_path / "none"))
    shard = damaged / "arrays.zarr/tokens/c/1"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"tokens/c/1 has {len(content) - 1} bytes, not {len(content)}" in fault(lambda: ShardReader(damaged))
    shard.unlink()
    assert "tokens/c/1 is missing" in fault(lambda: ShardReader(damaged))


@pytest.mark.parametrize("position", [0, 20, 700, -1])
def test_a_flipped_bit_is_found(damaged, fault, position):
    flip(damaged / "arrays.zarr/tokens/c/2", position)
    reader = ShardReader(damaged)
    assert "tokens/c/2 is damaged (its checksum is wrong)" in fault(reader.verify)
    assert "tokens/c/2 is damaged" in fault(lambda: reader.read(1999, 2001))
    reader.read(0, 2000)


def test_damaged_descriptions(damaged, fault):
    flip(damaged / "arrays.zarr/tokens/zarr.json", 30)
    assert "tokens/zarr.json is damaged" in fault(lambda: ShardReader(damaged))
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    assert "format 99" in fault(lambda: ShardReader(damaged))
    for content in ("", "[]", "{}", "{"):
        (damaged / "manifest.json").write_text(content)
        assert "manifest.json is damaged" in fault(lambda: ShardReader(damaged))


def test_every_flipped_byte_is_found(damaged, capsys, fault):
    """Every fifth byte of the manifest, and of the other files, but for most of many shards, the first, the last or another one."""
    draw = random.Random(0)
    files = sorted(file for file in damaged.rglob("*") if file.is_file())
    some = {damaged / "arrays.zarr/documents/c/0", *draw.sample(sorted((damaged / "arrays.zarr/tokens/c").iterdir()), 5)}
    for file in (file for file in files if file.parent.name != "c" or file in some):
        original = file.read_bytes()
        is_manifest = file.name == "manifest.json"
        between = draw.randrange(len(original))
        for place in range(0, len(original), 5) if is_manifest else [draw.choice((0, between, len(original) - 1))]:
            damage = bytearray(original)
            damage[place] = damage[place] ^ 1 << draw.randrange(8) if place % 2 else (damage[place] + draw.randrange(1, 256)) % 256
            file.write_bytes(damage)
            if is_manifest:
                fault(lambda: ShardReader(damaged, open_arrays=False))
            else:
                assert _verify(argparse.Namespace(folders=[damaged])) == 1, (file, place)
                assert file.name in capsys.readouterr().out
        file.write_bytes(original)
    assert _verify(argparse.Namespace(folders=[damaged])) == 0


def test_every_damaged_file_is_named(damaged):
    flip(damaged / "arrays.zarr/tokens/c/2", 9)
    flip(damaged / "tokenizer.model", 9)
    (damaged / "arrays.zarr/tokens/c/3").unlink()
    found = list(ShardReader(damaged, open_arrays=False).find_damage())
    assert [fault.rsplit("/", 1)[1].split(" (")[0] for fault in found] == ["2 is damaged", "3 is missing", "tokenizer.model is damaged"]


def test_shards_of_format_1_are_read(shards, damaged):
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["manifest_sha256"], manifest["side"], manifest["validation_share"]
    manifest |= {"format_version": 1, "sources": [{"name": "0.txt", "bytes": 5}]}
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    old, new = ShardReader(damaged), ShardReader(shards)
    assert np.array_equal(old.read(0, len(old)), new.read(0, len(new)))
    old.verify()
    assert "format 1" in inspect_shards(damaged)


def test_inspection_shows_sources_lengths_and_any_window(shards, tokenizer, texts, tmp_path, fault):
    reader = ShardReader(shards)
    report = inspect_shards(shards, document=3, length=10**6, histogram=tmp_path / "lengths.png")
    assert report.endswith("</s>\n".join(f"<s>{text}" for text in texts[3:]) + "</s>\n")
    start = int(reader.documents[1])
    assert inspect_shards(shards, start - 1, length=2).endswith(f"tokens {start - 1:,} to {start:,}:\n\n</s>\n<s>")
    lengths = np.diff(reader.documents)
    assert f"{lengths.min():,} at least, {lengths.max():,} at most" in report
    cells = report.split("\n")[3].split()
    assert cells[:4] == ["text", str(len(texts)), f"{len(reader):,}", "100.0%"] and cells[5] == "nothing"
    picture = matplotlib.image.imread(tmp_path / "lengths.png")
    assert picture.shape[:2] == (600, 1050) and np.ptp(picture[..., :3]) > 0.5
    assert "no document 10" in fault(lambda: inspect_shards(shards, document=10))
    assert "tokens from -1 on" in fault(lambda: inspect_shards(shards, -1))
    assert "is no PNG file" in fault(lambda: inspect_shards(shards, histogram=tmp_path / "x.pdf"))
