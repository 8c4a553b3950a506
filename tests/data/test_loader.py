"""The sample order is a permutation for every size, and batches are plain slices of the token stream, whatever the ranks."""

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from rdtrain.data.loader import STEPS_AHEAD, Loader, SampleOrder, rank_indices, read_ahead, validation_windows
from rdtrain.data.reading_benchmark import read_benchmark
from rdtrain.data.sharding import write_shards
from rdtrain.data.shards import ShardReader
from rdtrain.errors import UserError


@pytest.fixture(scope="module")
def reader(text_folder, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "shards"
    write_shards([text_folder], tokenizer, folder, shard_tokens=4096)
    return ShardReader(folder)


def epoch_of(order, epoch):
    return order.windows(np.full(order.samples, epoch), np.arange(order.samples))


@pytest.mark.parametrize("block, buffer_blocks", [(64, 16), (4, 3), (1, 1), (5, 1), (1, 7), (8, 2)])
def test_each_epoch_is_a_permutation(block, buffer_blocks):
    for samples in [*range(1, 130), 1023, 1024, 1025, 1088, 5000]:
        order = SampleOrder(samples, seed=7, block=block, buffer_blocks=buffer_blocks)
        for epoch in (0, 3):
            assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(samples)), (samples, epoch)


def test_one_by_one_and_all_at_once_agree():
    order = SampleOrder(1300, seed=2**64 - 1)
    assert [order.window(1, place) for place in range(0, 1300, 7)] == epoch_of(order, 1)[::7].tolist()
    epochs, places = np.array([2, 0, 1, 2]), np.array([5, 5, 1299, 0])
    assert order.windows(epochs, places).tolist() == [order.window(int(e), int(p)) for e, p in zip(epochs, places)]


def test_epochs_and_seeds_differ_and_the_order_is_fixed():
    order = SampleOrder(3000, seed=1)
    orders = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(SampleOrder(3000, seed=2), 0)]
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).mean() < 0.01
    # a resumed run depends on these numbers: a change of them is a change of format
    assert SampleOrder(100, seed=0).windows(np.zeros(5, int), np.arange(5)).tolist() == [57, 16, 68, 47, 89]


def test_the_order_has_two_levels():
    windows = epoch_of(SampleOrder(64 * 160, seed=3), 0)
    for buffer in windows.reshape(-1, 1024):
        blocks, counts = np.unique(buffer // 64, return_counts=True)
        assert len(blocks) == 16 and (counts == 64).all() and np.ptp(blocks) > 16
        assert (np.diff(buffer) == 1).mean() < 0.01


def test_the_order_is_even():
    """Each window is about as likely at each place."""
    epochs, places = np.divmod(np.arange(2000 * 24), 24)
    places = np.argsort(SampleOrder(24, 0, block=4, buffer_blocks=6).windows(epochs, places).reshape(2000, 24))
    counts = np.stack([np.bincount(column, minlength=24) for column in places.T])
    assert abs(counts - 2000 / 24).max() < 5.5 * (2000 / 24) ** 0.5


def test_batches_are_slices_of_the_stream(reader):
    tokens = torch.from_numpy(reader.read(0, len(reader)).astype(np.int64))
    for length in (1, 7, 50, 333, len(reader) - 1):
        loader = Loader(reader, length, seed=5)
        assert loader.samples_per_epoch == (len(reader) - 1) // length
        indices = range(loader.samples_per_epoch * 2 - 3 if loader.samples_per_epoch > 3 else 0, loader.samples_per_epoch * 2 + 3)
        batch = loader.batch(indices)
        assert batch.dtype == torch.int64 and batch.shape == (len(indices), length + 1)
        for row, index in zip(batch, indices):
            epoch, place = divmod(index, loader.samples_per_epoch)
            start = loader.order.window(epoch, place) * length
            assert torch.equal(row, tokens[start:start + length + 1])


def test_an_epoch_visits_every_window_once(reader):
    loader = Loader(reader, 50, seed=5)
    expected = validation_windows(reader, 50, 10**9)
    assert len(expected) == loader.samples_per_epoch
    for epoch in range(2):
        first = epoch * loader.samples_per_epoch
        rows = torch.cat([loader.batch([index]) for index in range(first, first + loader.samples_per_epoch)])
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_ranks_share_the_steps_samples():
    expected = list(range(5 * 12, 6 * 12))
    for world_size, micro_batch in itertools.product((1, 2, 3), (1, 2)):
        shares = [rank_indices(5, 12, world_size, rank, micro_batch) for rank in range(world_size)]
        assert all(len(share) == 12 // world_size // micro_batch for share in shares)
        assert all(len(indices) == micro_batch for share in shares for indices in share)
        # micro-step by micro-step, rank by rank, the samples come in their order
        assert [index for micro_step in zip(*shares) for indices in micro_step for index in indices] == expected


def test_a_group_of_ranks_shares_its_part_of_the_steps_samples_whatever_their_number():
    for members, group in itertools.product((1, 2, 3), range(2)):
        shares = [rank_indices(5, 12, 2 * members, group * members + member, 1, groups=2) for member in range(members)]
        taken = [index for micro_step in zip(*shares) for indices in micro_step for index in indices]
        assert taken == list(range(60 + 6 * group, 66 + 6 * group))


def test_the_union_over_ranks_is_the_same_batch(reader):
    loaders = [Loader(reader, 20, seed=1) for _ in range(3)]
    batches = [torch.cat([loaders[rank].batch(indices) for micro_step in zip(*(rank_indices(9, 6, world_size, r, 1)
                          for r in range(world_size))) for rank, indices in enumerate(micro_step)]) for world_size in (1, 2, 3)]
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])


def test_validation_windows(reader):
    tokens = torch.from_numpy(reader.read(0, len(reader)).astype(np.int64))
    windows = validation_windows(reader, 50, 3)
    assert torch.equal(windows, torch.stack([tokens[start:start + 51] for start in (0, 50, 100)]))
    assert windows.is_contiguous() and len(validation_windows(reader, 50, 10**9)) == (len(reader) - 1) // 50


def test_faults(reader, fault):
    assert "fewer than one window" in fault(lambda: Loader(reader, len(reader), seed=0))
    assert "fewer than one window" in fault(lambda: validation_windows(reader, len(reader), 1))
    assert "make it a multiple of 6" in fault(lambda: rank_indices(0, 8, 3, 0, 2))
    with pytest.raises(ValueError):
        SampleOrder(0, seed=0)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 5), (2, 20)])
def test_reading_ahead_gives_every_item_once_in_order_and_runs_no_further_than_it_may(start, stop):
    read = []
    for number, item in enumerate(read_ahead(lambda step: (read.append(step), step)[1], start, stop), start=start):
        assert item == number
        assert read == list(range(start, start + len(read))) and len(read) <= number - start + 1 + STEPS_AHEAD
    assert read == list(range(start, stop))


def test_an_error_comes_up_where_its_item_would_have_and_closing_ends_the_thread():
    def read(step):
        if step == 2:
            raise UserError("a damaged shard")
        return step

    items = read_ahead(read, 0, 10)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(UserError, match="a damaged shard"):
        next(items)
    items = read_ahead(lambda step: step, 0, 10**9)
    assert next(items) == 0
    items.close()
    deadline = time.monotonic() + 100
    while any(thread.name.startswith("read-ahead") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["tokens", "documents"])
def test_chunks_are_read_as_zarr_reads_them(reader, name):
    array = zarr.open_group(Path(reader.path) / "arrays.zarr", mode="r")[name]
    read = {"tokens": reader.read, "documents": reader.document_starts}[name]
    places = np.random.default_rng(0).integers(0, array.shape[0] + 1, (30, 2))
    for start, stop in [(0, array.shape[0]), (5, 5), *np.sort(places).tolist()]:
        found = read(start, stop)
        assert found.dtype == array.dtype and np.array_equal(found, array[start:stop])


def test_a_buffer_is_read_while_the_one_before_it_is_in_use(text_folder, tokenizer, tmp_path, monkeypatch):
    """No batch of a long epoch reads more than its share of blocks, and each block is read once."""
    write_shards([text_folder], tokenizer, tmp_path / "shards")
    reader, blocks = ShardReader(tmp_path / "shards"), []
    loader = Loader(reader, 4, seed=0)
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda start, stop: (blocks.append(start), read(start, stop))[1])
    counts, batches = [], loader.samples_per_epoch // 64
    for step in range(batches):
        loader.batch(range(step * 64, step * 64 + 64))
        counts.append(len(blocks) - sum(counts))
    assert batches > 50 and max(counts[1:]) <= 2 and len(blocks) <= loader.samples_per_epoch // 64 + 2 * 16
    assert len({*blocks}) == -(-loader.samples_per_epoch // 64)


def test_the_benchmark_of_reading(reader, tmp_path, fault):
    table = read_benchmark(Path(reader.path), tmp_path / "work", 50, 4, 0.01)
    assert "np.memmap" in table and "zarr, a window a read" in table and not (tmp_path / "work").exists()
    assert "exists already" in fault(lambda: read_benchmark(Path(reader.path), tmp_path, 50, 4, 0.01))
