"""What an engine does: it owns the model's weights, their gradients and the optimizer, and steps them together.

An engine is handed a plain module and an objective, and knows nothing of data, schedules or metrics. Which engine runs is a
setting, and the losses do not depend on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..model.recurrent import RecurrentDepthLM
from ..objectives import Loss, Metrics, Objective
from ..randomness import SampleRandom

MicroBatch = tuple[Tensor, SampleRandom]
"""Tokens [B, T + 1] on the engine's device, and the random numbers of their samples."""


@dataclass
class EngineSettings:
    """How the model is run and sharded.

    name: `deepspeed` (any number of ranks) or `torch` (one process of plain PyTorch, the reference).
    zero_stage: deepspeed only: 1 shards the optimizer state, 2 the gradients as well.
    compile: torch only: compile prelude, core, coda and loss with torch.compile before training starts.
    precision: `bf16` (fp32 master weights), `fp32`, or `auto`: bf16 on CUDA and fp32 on CPU.
    """

    name: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[1, 2] = 1
    compile: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self):
        """ValueError for an engine that cannot compile."""
        if self.compile and self.name != "torch":
            raise ValueError("compile works with the torch engine alone: use name=torch or leave compile off")

    @property
    def keeps_idle_blocks(self) -> bool:
        """Whether a block that is not trained stays as it is to the bit, weights and optimizer state: tests/distributed/test_blocks.py
        holds what is named here to it."""
        return self.name == "torch" or (self.name == "deepspeed" and self.zero_stage in (1, 2))

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that the precision means on this device."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32


class TrainingModule(nn.Module):
    """Model and objective as one module whose forward is the training loss, so that an engine's hooks see every pass."""

    def __init__(self, model: RecurrentDepthLM, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, tokens: Tensor, random: SampleRandom) -> tuple[Tensor, Metrics]:
        """The parts of a Loss, as a plain tuple: engines look for tensors in what comes out, and do not look into other classes."""
        loss = self.objective(self.model, tokens, random)
        return loss.value, loss.metrics


class Engine(ABC):
    """Weights, gradients and optimizer of one rank."""

    model: RecurrentDepthLM
    """The live model, for evaluation and for its weights."""

    facts: dict = {}
    """What a record of the run should say of the engine, for example the config that it was given."""

    autocast: AbstractContextManager = nullcontext()
    """What a forward pass outside `train_step` runs under."""

    @abstractmethod
    def train_step(self, micro_batches: Iterable[MicroBatch], learning_rate: float, block: int | None = None) -> list[Loss]:
        """One optimizer step over this rank's micro-batches; all are weighted alike. Returns their losses.

        block: the one that is trained, of a model with several; the others stay as they are. None where there is one.
        """

    def warm_up(self, tokens: Tensor, random: SampleRandom) -> None:
        """Run a forward and backward pass that changes nothing, so that a first use that costs time is over."""
        raise NotImplementedError

    @abstractmethod
    def gradient_norm(self) -> float:
        """The global gradient norm of the last step, before clipping."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into an existing folder; every rank calls this and writes its own files."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on the same number of ranks."""
