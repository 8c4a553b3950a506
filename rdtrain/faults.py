"""Steps that must not count: what is not finite, and what lies far beyond anything seen before.

One bad batch, or one flipped bit, can undo weeks of weights and of Adam's moments. Such a step is left out: weights, optimizer state and
what the objective learns beside them stay as they were, and only the step's number and its batch are gone. Every rank decides alike, since
the gradient norm is global and the loss is averaged over the ranks first, and on the device: the host reads the verdict a step later.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data.loader import rank_indices
from .data.output import write_atomically
from .distributed import World, read_later
from .errors import UserError

SETTLED = 50
"""Accepted steps after which the running levels are worth comparing with; until then they are plain means."""

RATE = 1 / SETTLED
"""Weight of a step in the running levels from there on."""


@dataclass
class FaultSettings:
    """What a run does about faults. They may change when it continues.

    gradient_spike: a step is skipped whose gradient norm is beyond this multiple of the running level; 0 for no limit.
    loss_spike: the same for its loss. With untied blocks both levels are those of the block where they are highest, since a block of low
        noise knows losses near 0 of any relative size. A step that is not finite is always skipped.
    stop_after_skipped: the run stops after so many skipped steps in a row.
    hang_seconds: a step, an evaluation, a save or a part of the start that takes longer has its stacks written down, and ends the process
        when it takes twice as long; 0 for no limit.
    """

    gradient_spike: float = 20.0
    loss_spike: float = 5.0
    stop_after_skipped: int = 10
    hang_seconds: float = 900.0

    def __post_init__(self):
        """ValueError for limits that healthy steps would be beyond, and for a run that stops before it starts."""
        for name in ("gradient_spike", "loss_spike"):
            if getattr(self, name) and getattr(self, name) <= 1:
                raise ValueError(f"{name} must be more than 1, or 0 for none, and it is {getattr(self, name)}")
        if self.stop_after_skipped < 1:
            raise ValueError(f"stop_after_skipped must be at least 1, and it is {self.stop_after_skipped}")
        if self.hang_seconds < 0:
            raise ValueError(f"hang_seconds must not be negative, and it is {self.hang_seconds}")


@dataclass
class SkippedStep:
    """step: counted from 1; rank_loss: of this rank's own sequences; loss and gradient_norm: of all ranks."""

    step: int
    learning_rate: float
    rank_loss: float
    loss: float
    gradient_norm: float


class StepJudge:
    """Says of each step whether it must be skipped, and keeps count. Its calls are collective.

    Attributes: skipped, bool on the device, of the last step judged; total, of the steps read so far; row, the steps just before the last
    one read, and it, that were skipped one after the other.
    """

    def __init__(self, settings: FaultSettings, blocks: int, world: World, state: dict | None = None):
        """blocks: of the model, each with levels of its own. state: of `state`, to go on from."""
        state = state or {"levels": [[0.0] * blocks] * 2, "seen": [0.0] * blocks, "skipped": 0}
        limits = [[limit or float("inf")] for limit in (settings.loss_spike, settings.gradient_spike)]
        float64 = {"dtype": torch.float64, "device": world.device}
        self._world = world
        self._limits = torch.tensor(limits, **float64).squeeze(1)
        self._levels, self._seen = torch.tensor(state["levels"], **float64), torch.tensor(state["seen"], **float64)
        self._unread: list[tuple[int, float, Callable[[], list[float]]]] = []
        self.block = 0
        self.total: int = state["skipped"]
        self.row: list[SkippedStep] = []

    def __call__(self, loss: Tensor, gradient_norm: Tensor | float) -> Tensor:
        """The verdict, a bool scalar on the device. loss: this rank's; gradient_norm: the global one. Waits for no CUDA device."""
        if not isinstance(gradient_norm, Tensor):
            gradient_norm = torch.full((), gradient_norm, device=loss.device)
        mean = self._world.sum(loss.detach().double()) / self._world.size
        values = torch.stack((mean, gradient_norm.detach().to(mean.device).double()))
        beyond = (values > self._limits * self._levels.amax(1)).any() & (self._seen.sum() >= SETTLED)
        self.skipped = ~values.isfinite().all() | beyond
        level, seen = self._levels[:, self.block], self._seen[self.block]
        moved = level + (values - level) * (1 / (seen + 1)).clamp(min=RATE)
        self._levels[:, self.block] = torch.where(self.skipped, level, moved)
        self._seen[self.block] += ~self.skipped
        self._record = torch.cat((self.skipped.double().view(1), loss.detach().double().view(1), values))
        return self.skipped

    def note(self, step: int, learning_rate: float) -> None:
        """Set down which step, counted from 1, was judged last."""
        self._unread.append((step, learning_rate, read_later(self._record)))

    def read(self, last_too: bool) -> list[SkippedStep]:
        """Count the noted steps, all or all but the last, for which a device may still be at work. Returns those that were skipped."""
        found = []
        while len(self._unread) > (not last_too):
            step, learning_rate, record = self._unread.pop(0)
            skipped, *values = record()
            if skipped:
                found.append(SkippedStep(step, learning_rate, *values))
                self.row.append(found[-1])
            else:
                self.row.clear()
        self.total += len(found)
        return found

    def state(self) -> dict:
        """Plain numbers for a checkpoint, the same on every rank."""
        return {"levels": self._levels.tolist(), "seen": self._seen.tolist(), "skipped": self.total}


def too_many_skipped(row: list[SkippedStep], config, world: World) -> UserError:
    """The end of a run that skipped one step after the other; what these were made of is written down in its folder. Collective.

    config: the run's Config.
    """
    path, batch, last = Path(config.run.folder) / "skipped_steps.json", config.batch, row[-1]
    groups = config.engine.groups(config.model.blocks)
    ranks = world.gather([step.rank_loss for step in row])
    if world.is_main:
        steps = []
        for place, step in enumerate(row):
            described = asdict(step)
            del described["rank_loss"]
            described["ranks"] = [
                {
                    "loss": losses[place],
                    "samples": [
                        list(indices)
                        for indices in rank_indices(step.step - 1, batch.global_sequences, world.size, rank, batch.micro_sequences, groups)
                    ],
                }
                for rank, losses in enumerate(ranks)
            ]
            steps.append(described)
        write_atomically(path, json.dumps({"seed": config.run.seed, "steps": steps}, indent=1) + "\n")
    return UserError(
        f"{len(row)} steps in a row were skipped, the last of them step {last.step} with loss {last.loss:.4g} and gradient norm "
        f"{last.gradient_norm:.4g}, where the loss or its gradient is not finite or far beyond its level: look at their batches in {path}, "
        f"or lower optimizer.learning_rate (now {config.optimizer.learning_rate}) or set optimizer.gradient_clipping in a new run.folder"
    )
