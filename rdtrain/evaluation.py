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
from .data.rows import bytes_per_target, count_documents, validation_documents
from .data.shards import ShardReader
from .distributed import World
from .engine import Engine
from .errors import UserError
from .objectives.base import sum_and_count
from .randomness import SampleRandom


@torch.no_grad()
def held_out_nll(nll: Callable[[Tensor, SampleRandom], Tensor], tokens: Tensor, indices: Sequence[int], micro_batch: int,
                 device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the nats of each predicted token, fp32 [b, T], and these tokens, [b, T], of so many of the sequences tokens [N, T + 1] at a
    time.

    nll: an engine's, or an objective's with its model. indices: N numbers that pick the noise of each sequence, whatever the
    micro-batch.
    """
    for start in range(0, len(indices), micro_batch):
        part = slice(start, start + micro_batch)
        rows = tokens[part].to(device)
        yield nll(rows, SampleRandom("validation", indices[part], device)), rows[:, 1:]


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


def validation_rows(reader: ShardReader, sequence_length: int, count: int, rows: str, first: int = 0) -> tuple[Tensor, float]:
    """Held-out sequences, int64 [N, sequence_length + 1], `count` from number `first` on or all there are, and the bytes of text for each
    target.

    rows: `packed` or `documents`, as DataSettings has it. UserError where there is no sequence.
    """
    if rows == "documents":
        return validation_documents(reader, sequence_length, count, first), bytes_per_target(reader)
    return validation_windows(reader, sequence_length, count, first), reader.bytes_per_token


class Evaluator:
    """Evaluates the sequences whenever it is asked, each on one rank, which reads it then, a micro-batch at a time."""

    def __init__(self, reader: ShardReader, sequence_length: int, settings: EvaluationSettings, micro_batch: int, world: World, ranks: int,
                 rows: str = "packed"):
        """ranks: so many, from rank 0 on, can compute likelihoods; the others make as many passes, of which nothing counts. rows: as
        `validation_rows` takes it. Raises UserError when the validation shards hold no whole sequence."""
        sequences = count_documents(reader) if rows == "documents" else count_windows(reader, sequence_length)
        sequences = min(settings.sequences or sequences, sequences)
        share = math.ceil(sequences / ranks)
        places = range(world.rank % ranks * share, (world.rank % ranks + 1) * share)
        # Where they cannot be shared evenly, some ranks end with the last sequence of all, which is not theirs to count.
        self._indices = [min(place, sequences - 1) for place in places]
        self._counted = len(range(places.start, min(places.stop, sequences))) if world.rank < ranks else 0
        self._reader, self._sequence_length, self._rows, self._micro_batch = reader, sequence_length, rows, micro_batch
        self._bytes_per_token = bytes_per_target(reader) if rows == "documents" else reader.bytes_per_token
        self._world = world

    def __call__(self, engine: Engine, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{"validation_nll": nats per token, "validation_bits_per_byte": ...}. A collective call.

        stop: asked after each micro-batch whether to leave off, which all ranks must answer alike; None is returned then. UserError where
        the likelihood is not finite, so that no such weights are saved as a run's last.
        """
        device = self._world.device
        total, counted = torch.zeros(2, dtype=torch.float64, device=device), self._counted
        with closing(read_ahead(self._read, 0, math.ceil(len(self._indices) / self._micro_batch))) as batches:
            for indices, tokens in batches:
                ((nll, targets),) = held_out_nll(engine.held_out_nll, tokens, indices, self._micro_batch, device)
                total += torch.stack(sum_and_count(nll[:counted].double(), targets[:counted]))
                counted = max(0, counted - len(nll))
                if stop():
                    return None
        nll_sum, count = self._world.sum(total).tolist()
        nll = nll_sum / count
        if not math.isfinite(nll):
            raise UserError(
                f"the held-out NLL is {nll}, as training has diverged: lower optimizer.learning_rate or set optimizer.gradient_clipping in "
                "a new run.folder"
            )
        return {"validation_nll": nll, "validation_bits_per_byte": nll / math.log(2) / self._bytes_per_token}

    def _read(self, batch: int) -> tuple[list[int], Tensor]:
        """The numbers [b] of the sequences of a micro-batch, and their tokens [b, T + 1]."""
        indices = self._indices[batch * self._micro_batch:(batch + 1) * self._micro_batch]
        try:
            count = indices[-1] + 1 - indices[0]
            tokens, _ = validation_rows(self._reader, self._sequence_length, count, self._rows, first=indices[0])
        except UserError as error:
            error.everywhere = False  # the other ranks read other sequences
            raise
        return indices, tokens[[index - indices[0] for index in indices]]
