"""Rows of one document each are plain slices of the token stream with padding, in an order that covers every document once an epoch."""

import numpy as np
import pytest
import torch

from rdtrain.data import rows as rows_module
from rdtrain.data.rows import DocumentRows, bytes_per_target, validation_documents
from rdtrain.data.sharding import write_shards
from rdtrain.data.shards import ShardReader

LENGTH, PADDING = 12, -100


@pytest.fixture(scope="module")
def reader(texts, tokenizer, tmp_path_factory):
    """150 documents, some of a single character and a few much longer than a row."""
    folder = tmp_path_factory.mktemp("rows")
    for number in range(150):
        length = 1 + (number * 7) % 30 + 3000 * (number % 40 == 3)
        (folder / f"{number:03}.txt").write_text(texts[number % 10][number : number + length] + "x")
    write_shards([folder], tokenizer, folder / "shards")
    return ShardReader(folder / "shards")


def expected_row(reader, document):
    start, stop = reader.documents[document : document + 2]
    tokens = reader.read(start, stop)[: LENGTH + 1].tolist()
    return tokens + [PADDING] * (LENGTH + 1 - len(tokens))


@pytest.mark.parametrize("chunk", [40, 10**6])
def test_batches_are_the_documents_of_the_order(reader, monkeypatch, chunk):
    monkeypatch.setattr(rows_module, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(rows_module, "PART", 128)
    loader = DocumentRows(reader, LENGTH, seed=5)
    assert loader.samples_per_epoch == reader.document_count == 150
    for epoch in range(2):
        batch = loader.batch(range(150 * epoch, 150 * (epoch + 1)))
        documents = [loader.order.window(epoch, place) for place in range(150)]
        assert batch.dtype == torch.int64 and sorted(documents) == list(range(150))
        assert batch.tolist() == [expected_row(reader, document) for document in documents]
        assert torch.equal(torch.cat([loader.batch([150 * epoch + place]) for place in (149, 3)]), batch[[149, 3]])


def test_validation_reads_the_first_documents_once(reader):
    assert validation_documents(reader, LENGTH, 70).tolist() == [expected_row(reader, document) for document in range(70)]
    assert len(validation_documents(reader, LENGTH, 10**9)) == 150


def test_what_is_cut_and_what_is_filled_is_counted(reader, monkeypatch):
    monkeypatch.setattr(rows_module, "PART", 64)
    loader, lengths = DocumentRows(reader, LENGTH, seed=0), np.diff(reader.documents)
    targets = sum((row[1:] != PADDING).sum().item() for row in validation_documents(reader, LENGTH, 150))
    assert loader.cut == sum(length > LENGTH + 1 for length in lengths.tolist()) > 0
    assert loader.filled == targets / (150 * LENGTH) < 1
    assert str(loader).startswith(f"one document a row: {loader.cut} of 150 documents are cut to 12 + 1 tokens, and {loader.filled:.1%} of")
    assert bytes_per_target(reader) == reader.text_bytes / sum(length - 1 for length in lengths.tolist())
