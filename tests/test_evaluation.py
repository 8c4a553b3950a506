"""Held-out sequences are each evaluated once, whatever the ranks, and a rank reads no others than its own."""

import torch

from rdtrain.data.loader import validation_windows
from rdtrain.data.shards import ShardReader
from rdtrain.distributed import World
from rdtrain.evaluation import EvaluationSettings, Evaluator

LENGTH = 64


class FakeEngine:
    """Its nats are the tokens; it keeps what it was given."""

    def __init__(self):
        self.tokens, self.indices = [], []

    def held_out_nll(self, tokens, random):
        self.tokens.append(tokens)
        self.indices.append(random.indices)
        return tokens[:, 1:].float()


def test_ranks_share_all_sequences_and_read_only_their_own(shards, monkeypatch):
    reader = ShardReader(shards / "validation")
    everything = validation_windows(reader, LENGTH, 10**9)
    sums, read, reads = [], [], reader.read
    monkeypatch.setattr(World, "sum", lambda world, own: (sums.append(own), own.clamp(min=1))[1])
    monkeypatch.setattr(reader, "read", lambda start, stop: (read.append(stop - start), reads(start, stop))[1])
    for size, ranks, sequences in ((1, 1, 0), (2, 2, 5), (3, 3, 0), (8, 8, 5), (4, 2, 7)):
        settings = EvaluationSettings(sequences=sequences)
        count = min(sequences or len(everything), len(everything))
        passes, taken = set(), set()
        sums.clear()
        for rank in range(size):
            engine = FakeEngine()
            read.clear()
            Evaluator(reader, LENGTH, settings, 2, World(rank, size, rank, torch.device("cpu")), ranks)(engine)
            indices = [index for batch in engine.indices for index in batch]
            assert torch.equal(torch.cat(engine.tokens), everything[indices])
            assert sum(read) <= LENGTH * len(indices) + len(read) and len(set(indices)) <= -(-count // ranks)
            passes.add(tuple(map(len, engine.indices)))
            taken.update(indices if rank < ranks else ())
        assert len(passes) == 1  # ranks wait for each other in each pass
        assert taken == set(range(count))
        assert sum(sums).tolist() == [everything[:count, 1:].sum(), count * LENGTH]
