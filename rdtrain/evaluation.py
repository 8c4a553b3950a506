"""Held-out negative log-likelihood during training.

What a likelihood is, the objective says: for denoising models the distribution of one iteration from pure noise, for unrolled
models that after all K iterations. The same sequences with the same noise at every evaluation, shared out over the ranks, which
all make the same number of passes: where weights are sharded, a pass is a conversation of all ranks. Where ranks hold a block each,
those of block 0, which serves sigma_max, share out all sequences.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.loader import count_windows, read_ahead, validation_windows
from .data.shards import ShardReader
from .distributed import World
from .engine import Engine
from .errors import UserError
from .objectives.base import sum_and_count
from .randomness import SampleRandom


@torch.no_grad()
def held_out_nll(nll: Callable[[Tensor, SampleRandom], Tensor], tokens: Tensor, indices: Sequence[int], micro_batch: int,
                 device: torch.device) -> Iterator[Tensor]:
    """Yield the nats of each predicted token, fp32 [b, T], of so many of the sequences tokens [N, T + 1] at a time.

    nll: an engine's, or an objective's with its model. indices: N numbers that pick the noise of each sequence, whatever the
    micro-batch.
    """
    for start in range(0, len(indices), micro_batch):
        part = slice(start, start + micro_batch)
        yield nll(tokens[part].to(device), SampleRandom("validation", indices[part], device))


@dataclass
class EvaluationSettings:
    """How held-out loss is taken.

    interval: steps between two evaluations; the last step is always evaluated.
    sequences: validation sequences, from the start of the validation shards (all of them where there are fewer); 0 for all.
    """

    interval: int = 100
    sequences: int = 64

    def __post_init__(self):
        """ValueError for evaluations that cannot be."""
        if self.interval < 1 or self.sequences < 0:
            raise ValueError("interval must be at least 1, and sequences at least 1, or 0 for all")


class Evaluator:
    """Evaluates the sequences whenever it is asked, each on one rank, which reads it then, a micro-batch at a time."""

    def __init__(self, reader: ShardReader, sequence_length: int, settings: EvaluationSettings, micro_batch: int, world: World, ranks: int):
        """ranks: so many, from rank 0 on, can compute likelihoods; the others make as many passes, of which nothing counts. Raises
        UserError when the validation shards hold no whole sequence."""
        windows = count_windows(reader, sequence_length)
        windows = min(settings.sequences or windows, windows)
        share = math.ceil(windows / ranks)
        places = range(world.rank % ranks * share, (world.rank % ranks + 1) * share)
        # Where they cannot be shared evenly, some ranks end with the last sequence of all, which is not theirs to count.
        self._indices = [min(place, windows - 1) for place in places]
        self._counted = len(range(places.start, min(places.stop, windows))) if world.rank < ranks else 0
        self._reader, self._sequence_length, self._micro_batch = reader, sequence_length, micro_batch
        self._world = world
        self._bytes_per_token = reader.bytes_per_token

    def __call__(self, engine: Engine, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{"validation_nll": nats per token, "validation_bits_per_byte": ...}. A collective call.

        stop: asked after each micro-batch whether to leave off, which all ranks must answer alike; None is returned then.
        """
        device = self._world.device
        total, counted = torch.zeros(2, dtype=torch.float64, device=device), self._counted
        with closing(read_ahead(self._read, 0, math.ceil(len(self._indices) / self._micro_batch))) as batches:
            for indices, tokens in batches:
                (nll,) = held_out_nll(engine.held_out_nll, tokens, indices, self._micro_batch, device)
                nll, counted = nll[:counted], max(0, counted - len(nll))
                total += torch.stack(sum_and_count(nll.double()))
                if stop():
                    return None
        nll_sum, count = self._world.sum(total).tolist()
        nll = nll_sum / count
        return {"validation_nll": nll, "validation_bits_per_byte": nll / math.log(2) / self._bytes_per_token}

    def _read(self, batch: int) -> tuple[list[int], Tensor]:
        """The numbers [b] of the sequences of a micro-batch, and their tokens [b, T + 1]."""
        indices = self._indices[batch * self._micro_batch:(batch + 1) * self._micro_batch]
        try:
            tokens = validation_windows(self._reader, self._sequence_length, indices[-1] + 1 - indices[0], first=indices[0])
        except UserError as error:
            error.everywhere = False  # the other ranks read other sequences
            raise
        return indices, tokens[[index - indices[0] for index in indices]]
