"""The optimizer and its learning rate: AdamW, linear warmup, decay.

The learning rate is a function of the step alone, so a resumed run has nothing to restore. A run's length is given in steps or
as a budget of training FLOPs; with a budget, arms of different cost per token are compared at equal compute.

Of a model with untied blocks a step trains one, and the optimizer does not touch the others: see BlockAdamW.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .measurement import Measurement
from .model.recurrent import RecurrentDepthLM


@dataclass
class OptimizerSettings:
    """AdamW.

    learning_rate: the peak.
    learning_rate_source: where the peak was chosen, for the reader of reports.
    embedding_scale: the embedding's learning rate as a multiple of learning_rate. Its rows bear a higher one than the matrices of the
        layers, and the more so the wider the model is (Yang et al. 2022, arXiv 2203.03466, table 8).
    beta1, beta2, epsilon: of Adam.
    weight_decay: on matrices; norms and biases have none.
    gradient_clipping: largest global norm of the gradient; 0 for none.
    """

    learning_rate: float = 1e-3
    learning_rate_source: str = ""
    embedding_scale: float = 4.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0

    def __post_init__(self):
        """ValueError, in one sentence, for numbers that AdamW does not take."""
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, and it is {self.learning_rate}")
        if self.embedding_scale <= 0:
            raise ValueError(f"embedding_scale must be positive, and it is {self.embedding_scale}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 and beta2 must lie in [0, 1), and they are {self.beta1} and {self.beta2}")
        if self.weight_decay < 0 or self.gradient_clipping < 0 or self.epsilon <= 0:
            raise ValueError("weight_decay and gradient_clipping must not be negative, and epsilon must be positive")


@dataclass
class ScheduleSettings:
    """Length of the run and shape of the learning rate.

    steps: optimizer steps; or
    training_flops: floating-point operations to spend, from which the steps follow. One of the two must be given.
    until_nll: end at the first evaluation whose held-out NLL, in nats a token, is at most this, if that comes sooner; the learning rate
        decays as if it did not, so decay=constant goes well with it.
    warmup_fraction: share of the steps over which the learning rate rises from 0.
    decay: its shape after that.
    final_fraction: learning rate at the end, as a share of the peak.
    """

    steps: int | None = None
    training_flops: float | None = None
    until_nll: float | None = None
    warmup_fraction: float = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.1

    def __post_init__(self):
        """ValueError, in one sentence, for a run without a length or with two."""
        if (self.steps is None) == (self.training_flops is None):
            raise ValueError("one of steps and training_flops must be given, and not both")
        if (self.steps is not None and self.steps < 1) or (self.training_flops is not None and self.training_flops <= 0):
            raise ValueError("the length of the run must be positive")
        if not (0 <= self.warmup_fraction <= 1 and 0 <= self.final_fraction <= 1):
            raise ValueError("warmup_fraction and final_fraction must lie in [0, 1]")


def learning_rate(step: int, total_steps: int, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    warmup = math.ceil(schedule.warmup_fraction * total_steps)
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule.decay]
    return optimizer.learning_rate * (schedule.final_fraction + (1 - schedule.final_fraction) * shape)


class BlockAdamW(torch.optim.AdamW):
    """torch's AdamW over groups that each have a `block`: an untied block of the model, or None for what all blocks share.

    A step leaves the groups of idle blocks out, so momentum and weight decay do not move them, and their step counts stand still: a
    block's bias correction counts its own steps. It is the groups that are left out because a sharding engine gives an idle block
    a gradient of zeros, which is a gradient to Adam. Every group has its state from the first step on, so that a checkpoint holds it
    whatever blocks have been trained by then.
    """

    active_block: int | None = None
    """The block that the next step trains; None trains all."""

    must_skip: Callable[[], Tensor] | None = None
    """Asked in each step whether it must change nothing: a bool scalar, the same however often it is asked. None for never. A fused
    optimizer leaves the choice to the device that holds the scalar."""

    measurement: Measurement | None = None
    """Shown the gradients of each step and what it did with them."""

    def create_state(self) -> None:
        """State of step 0 for what `param_groups` holds now and has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    step_device = parameter.device if group["fused"] else "cpu"  # where torch's own initialisation has it
                    self.state[parameter] |= {
                        "step": torch.zeros((), dtype=torch.float32, device=step_device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    def step(self, closure=None):
        """One step of the active groups, of those that `param_groups` holds now: ZeRO may show a part of them at a time."""
        self.create_state()
        groups = self.param_groups
        active = [group for group in groups if self.active_block is None or group["block"] in (None, self.active_block)]
        if self.measurement is not None:
            self.measurement.add_gradients(active)
        if self.must_skip is not None:
            skip = self.must_skip()
            if self.defaults["fused"]:  # torch's own means, for gradients that overflow: weights, moments and step counts stay
                device = next(parameter.device for group in self.param_groups for parameter in group["params"])
                self.found_inf = skip.to(device).float()
            elif skip:
                return None
        self.param_groups = active
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        if self.measurement is not None:
            self.measurement.add_updates(active, self.state)


def build_optimizer(model: RecurrentDepthLM, settings: OptimizerSettings) -> BlockAdamW:
    """AdamW over matrices, which decay, and vectors, which do not: a group of each, and with untied blocks two more for each block.

    The embedding, which decays, is a group of its own. Fused on CUDA.
    """
    untied, embedding = len(model.cores) > 1, model.embedding.weight
    shared = [p for name, p in model.named_parameters() if p is not embedding and not (untied and name.startswith("cores."))]
    parts: dict[int | None, list[nn.Parameter]] = {None: shared}
    if untied:
        parts |= {block: list(core.parameters()) for block, core in enumerate(model.cores)}
    common = {"block": None, "learning_rate_scale": 1.0}
    groups = [common | {"params": [embedding], "weight_decay": settings.weight_decay, "learning_rate_scale": settings.embedding_scale}]
    for block, parameters in parts.items():
        matrices, vectors = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
        groups.append(common | {"params": matrices, "weight_decay": settings.weight_decay, "block": block})
        groups.append(common | {"params": vectors, "weight_decay": 0.0, "block": block})
    return BlockAdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=model.embedding.weight.is_cuda,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group of a BlockAdamW, or of an engine's optimizer around it, its multiple of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_scale"]
