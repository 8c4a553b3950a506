"""Held-out negative log-likelihood during training.

What a likelihood is, the objective says: for denoising models the distribution of one iteration from pure noise, for unrolled
models that after all K iterations. The same sequences with the same noise at every evaluation, shared out over the ranks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.loader import validation_windows
from .data.shards import ShardReader
from .distributed import World
from .engine import Engine
from .model.recurrent import RecurrentDepthLM
from .objectives import Objective
from .randomness import SampleRandom


@torch.no_grad()
def held_out_nll(model: RecurrentDepthLM, objective: Objective, tokens: Tensor, indices: Sequence[int], micro_batch: int,
                 device: torch.device, autocast: AbstractContextManager) -> Iterator[Tensor]:
    """Yield the nats of each predicted token, fp32 [b, T], of so many of the sequences tokens [N, T + 1] at a time.

    indices: N numbers that pick the noise of each sequence, whatever the micro-batch. Runs under `autocast`.
    """
    for start in range(0, len(indices), micro_batch):
        part = slice(start, start + micro_batch)
        with autocast:
            nll = objective.held_out_nll(model, tokens[part].to(device), SampleRandom("validation", indices[part], device))
        yield nll


@dataclass
class EvaluationSettings:
    """How held-out loss is taken.

    interval: steps between two evaluations; the last step is always evaluated.
    sequences: validation sequences, from the start of the validation shards (all of them where there are fewer).
    """

    interval: int = 100
    sequences: int = 64

    def __post_init__(self):
        """ValueError for an evaluation of nothing."""
        if self.interval < 1 or self.sequences < 1:
            raise ValueError("interval and sequences must be at least 1")


class Evaluator:
    """Reads its sequences once and evaluates them whenever it is asked."""

    def __init__(self, reader: ShardReader, sequence_length: int, settings: EvaluationSettings, micro_batch: int, world: World):
        """Raises UserError when the validation shards hold no whole sequence."""
        tokens = validation_windows(reader, sequence_length, settings.sequences)
        mine = range(world.rank, len(tokens), world.size)
        self._tokens, self._indices = tokens[mine.start :: mine.step], list(mine)
        self._micro_batch = micro_batch
        self._world = world
        self._bytes_per_token = reader.bytes_per_token

    def __call__(self, engine: Engine, objective: Objective) -> dict[str, float]:
        """{"validation_nll": nats per token, "validation_bits_per_byte": ...}. A collective call."""
        device = self._world.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for nll in held_out_nll(engine.model, objective, self._tokens, self._indices, self._micro_batch, device, engine.autocast):
            total += torch.stack((nll.double().sum(), torch.tensor(float(nll.numel()), device=device)))
        nll_sum, count = self._world.sum(total).tolist()
        nll = nll_sum / count
        return {"validation_nll": nll, "validation_bits_per_byte": nll / math.log(2) / self._bytes_per_token}
