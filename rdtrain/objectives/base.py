"""What an objective is: it alone decides what a training step computes, and what the model's held-out likelihood means."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.recurrent import ModelConfig, RecurrentDepthLM
from ..randomness import SampleRandom


@dataclass
class ObjectiveSettings:
    """What is trained.

    name: `diffusion_blocks` (each iteration a denoiser, one pass) or `bptt` (backpropagation through unrolled iterations).
    free_iterations: bptt only: iterations that run first, without gradient.
    trained_iterations: bptt only: iterations that follow and carry gradient. 24 + 8 is Huginn's truncated BPTT, 0 + K the full
        one, and K - 1 and 1 trains the last iteration alone.
    """

    name: Literal["diffusion_blocks", "bptt"] = "diffusion_blocks"
    free_iterations: int = 24
    trained_iterations: int = 8

    def __post_init__(self):
        """ValueError, in one sentence, for counts that make no unrolled model."""
        if self.free_iterations < 0 or self.trained_iterations < 1:
            raise ValueError(
                "free_iterations must be at least 0 and trained_iterations at least 1, "
                f"and they are {self.free_iterations} and {self.trained_iterations}"
            )


Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sums, counts), detached tensors of one shape, `loss` among them; both are added over micro-batches and ranks before they
are divided."""


@dataclass
class Loss:
    """value: the scalar to differentiate, the mean over all tokens of the micro-batch."""

    value: Tensor
    metrics: Metrics


class Objective(ABC):
    """One way to train a recurrent-depth model. Tokens are int64 [B, T + 1]; position i of T predicts token i + 1."""

    noise_conditioning: bool
    """Whether its models take a noise level."""

    untied_blocks: bool = False
    """Whether it trains models with more than one block."""

    @abstractmethod
    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        """The training loss of a micro-batch."""

    @abstractmethod
    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """The model's next-token distribution as logits [B, T, V], from inputs [B, T] and noise, never from a target."""

    @abstractmethod
    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Operations per trained token, forward and backward."""

    def active_block(self, random: SampleRandom) -> int | None:
        """The block that a step trains, the others standing idle: a function of (seed, step), the same for all its micro-batches on
        all ranks. None where nothing is idle."""
        return None

    def held_out_nll(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Tensor:
        """Negative log-likelihood in nats of each predicted token, fp32 [B, T]."""
        return token_losses(self.next_token_logits(model, tokens[:, :-1], random), tokens[:, 1:])


def sum_and_count(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The metric of a tensor of losses: their sum and their number."""
    return losses.detach().sum(), torch.tensor(float(losses.numel()), device=losses.device)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each position: logits [B, T, V], targets [B, T] -> fp32 [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
