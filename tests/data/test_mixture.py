"""A mixture counts like a slow loop over its samples, is the same for any ranks and after any resume, and may change in a run."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from rdtrain.data.loader import Loader, rank_indices
from rdtrain.data.mixture import BLOCK, STRETCH, Mixture, MixtureLoader, Quotas, open_loader
from rdtrain.data.sharding import write_shards
from rdtrain.data.shards import ShardReader
from rdtrain.data.tokenizer_training import train_tokenizer
from rdtrain.data.units import NamedSource

WEIGHTS = [[1], [3, 1], [0.7, 0.3], [1, 1, 1], [5, 0, 2, 2, 1], [1e-3, 1, 17.5, 2, 2, 3], [1, 1, 2, 3, 5, 8, 13, 21], [0.1] * 12]


def slow_counts(weights, samples):
    """After each of the samples: every group of Huffman's code is handed one sample at a time, and rounds in fractions."""
    nodes = [(Fraction(str(weight)), [source]) for source, weight in enumerate(weights) if weight]
    groups = []
    while len(nodes) > 1:
        nodes.sort(key=lambda node: node[0])  # stable: of equal ones the older first
        light, heavy = nodes[:2]
        groups.insert(0, (light[0] / (light[0] + heavy[0]), light[1], heavy[1]))
        nodes = [*nodes[2:], (light[0] + heavy[0], light[1] + heavy[1])]
    given = Counter()
    for _ in range(samples):
        here = set(nodes[0][1])
        for share, light, heavy in groups:
            if here == set(light) | set(heavy):
                key = tuple(light), tuple(heavy)
                given[key] += 1
                to_light = (given[key] * share + Fraction(1, 2)) // 1 - given[key, "light"]
                given[key, "light"] += to_light
                here = set(light) if to_light else set(heavy)
        (source,) = here
        given[source] += 1
        yield [given[source] for source in range(len(weights))]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_quotas_are_those_of_a_slow_loop_and_near_their_weights(weights):
    quotas, exact = Quotas(weights), [Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights]
    for samples, counts in enumerate(slow_counts(weights, 500), start=1):
        assert quotas.counts(samples) == counts
    bound = 0.5 if len(weights) <= 2 else 2
    for samples in [*range(2000), 10**12 + 7, 2**63]:
        counts = quotas.counts(samples)
        assert sum(counts) == samples and max(abs(count - samples * part) for count, part in zip(counts, exact)) <= bound


def test_samples_of_a_source_are_numbered_in_their_order_and_each_block_has_its_quota():
    weights = {"web": 3, "code": 1, "old": 0, "books": 0.5}
    mixture, quotas, samples = Mixture(weights, seed=9), Quotas([0.5, 1, 0, 3]), 3 * STRETCH
    assert mixture.names == ["books", "code", "old", "web"]
    sources, numbers = mixture.places(range(samples))
    drawn = Counter()
    for sample, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist())):
        if sample % BLOCK == 0:
            assert [drawn[source] for source in range(4)] == quotas.counts(sample)
        if sample % 97 == 0:
            assert mixture.drawn(sample) == {name: drawn[source] for source, name in enumerate(mixture.names)}
        assert number == drawn[source]
        drawn[source] += 1
    shuffled = np.random.default_rng(0).permutation(samples)
    assert all((one == many[shuffled]).all() for one, many in zip(mixture.places(shuffled), (sources, numbers)))
    assert (sources != Mixture(weights, seed=10).places(range(samples))[0]).mean() > 0.2


def test_blocks_are_shuffled_evenly():
    """At each place of a block each source is about as often as its weight says, and so is what follows it."""
    blocks = Mixture({"a": 1, "b": 1}, seed=0).places(range(4000 * BLOCK))[0].reshape(4000, BLOCK)
    assert abs(blocks.sum(0) - 2000).max() < 5 * 1000**0.5
    assert abs((blocks[:, 1:] == blocks[:, :-1]).mean() - 31 / 63) < 0.005


def test_changed_weights_count_on_from_what_was_drawn_and_a_resume_of_a_resume_agrees():
    changes = [(0, {"a": 3, "b": 1}), (1000, {"a": 1, "b": 1, "c": 2}), (1001, {"b": 1, "c": 0}), (5000, {"a": 3, "b": 1})]
    resumed, drawn, taken = Mixture(changes[0][1], seed=4), Counter(), []
    for (first, weights), (last, _) in zip(changes, [*changes[1:], (7000, None)]):
        mixture = Mixture(weights, seed=4)
        mixture.continue_from(resumed.phases, first)
        assert mixture.drawn(first) == {name: drawn[name] for name in mixture.names}
        for source, number in zip(*map(np.ndarray.tolist, mixture.places(range(first, last)))):
            name = mixture.names[source]
            assert number == drawn[name] and weights[name] > 0
            drawn[name] += 1
            taken.append((name, number))
        resumed = Mixture(weights, seed=4)
        resumed.continue_from(mixture.phases, last)  # the same weights: nothing new
        assert resumed.phases == mixture.phases and len(mixture.phases) == 1 + changes.index((first, weights))
    assert [(resumed.names[s], n) for s, n in zip(*map(np.ndarray.tolist, resumed.places(range(7000))))] == taken
    again = Mixture({"a": 1.0}, seed=4)
    again.continue_from(resumed.phases, 3000)  # a checkpoint before the last change, which then never was
    assert [phase["first_sample"] for phase in again.phases] == [0, 1000, 1001, 3000]


@pytest.fixture(scope="module")
def folders(text_folder, tokenizer, tmp_path_factory):
    """Two folders of shards, the first of two named sources."""
    folder = tmp_path_factory.mktemp("mixture")
    sources = [NamedSource(name, (str(text_folder / f"{number}.txt"),)) for number, name in enumerate(("first", "second"))]
    write_shards(sources, tokenizer, folder / "both")
    write_shards([text_folder / "2.txt"], tokenizer, folder / "third")
    return {"both": str(folder / "both"), "third": str(folder / "third")}


def test_each_source_goes_through_its_own_windows_once_an_epoch(folders):
    loader = open_loader(folders, {"both/first": 2, "both/second": 1, "third": 1}, "packed", 20, seed=3)
    reader, third = ShardReader(folders["both"]), ShardReader(folders["third"])
    windows = {"third": Loader(third, 20, 0)}
    for source in reader.manifest["sources"]:
        windows[f"both/{source['name']}"] = Loader(reader, 20, 0, source["first_token"], source["tokens"])
    assert loader.samples_per_epoch == {name: each.samples_per_epoch for name, each in windows.items()}
    samples = 4 * max(loader.samples_per_epoch.values())
    sources, numbers = loader.mixture.places(range(samples))
    rows = loader.batch(range(samples))
    for source, name in enumerate(loader.mixture.names):
        count = loader.samples_per_epoch[name]
        whole = sorted(map(tuple, windows[name].batch(range(count)).tolist()))
        for epoch in range(int(loader.epochs(samples)[name])):
            here = torch.from_numpy((sources == source) & (numbers // count == epoch))
            assert sorted(map(tuple, rows[here].tolist())) == whole
    ends = [source["first_token"] + source["tokens"] for source in reader.manifest["sources"]]
    assert windows["both/first"].samples_per_epoch == (ends[0] - 1) // 20  # no window reaches into the next source


@pytest.mark.parametrize("mixture", [{}, {"first": 3, "second": 1}])
def test_any_ranks_and_any_resume_give_the_same_samples_in_the_same_order(folders, mixture):
    steps, batch, generator = 6, 48, np.random.default_rng(1)
    expected = open_loader(folders["both"], mixture, "packed", 8, seed=2).batch(range(steps * batch))
    for ranks in (1, 2, 3, 8):
        micro = int(generator.choice([size for size in (1, 2, 3, 6) if batch % (ranks * size) == 0]))
        rows, stops = torch.zeros_like(expected), {0, steps, *generator.integers(1, steps, 2).tolist()}
        loaders = []
        for step in range(steps):
            if step in stops:  # a new start
                loaders = [open_loader(folders["both"], mixture, "packed", 8, seed=2) for _ in range(ranks)]
            for rank, loader in enumerate(loaders):
                for share in rank_indices(step, batch, ranks, rank, micro):
                    rows[share.start:share.stop] += loader.batch(share)
        assert torch.equal(rows, expected), ranks


def test_faults(folders, fault, tokenizer, text_folder, tmp_path):
    assert "no such source: name some of first, second" in fault(lambda: open_loader(folders["both"], {"third": 1}, "packed", 8, 0))
    assert "name some of both, third, both/first" in fault(lambda: open_loader(folders, {"all": 1}, "packed", 8, 0))
    assert "of one source, fewer than one window" in fault(lambda: open_loader(folders["both"], {"first": 1}, "packed", 10**6, 0))
    write_shards([text_folder / "2.txt"], train_tokenizer([text_folder], tmp_path / "tokenizer", 700), tmp_path / "shards")
    other = folders | {"other": str(tmp_path / "shards")}
    assert "was written with tokenizer" in fault(lambda: open_loader(other, {"third": 1, "other": 1}, "packed", 8, 0))
    assert isinstance(open_loader(folders, {"third": 1}, "packed", 8, 0), MixtureLoader)
