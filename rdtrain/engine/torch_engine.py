"""Plain PyTorch in one process: the engine that every other is measured against."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..objectives import Loss
from ..optimization import OptimizerSettings, build_optimizer, set_learning_rate
from ..randomness import SampleRandom
from .base import Engine, Judge, MicroBatch, TrainingModule, mean_loss


class TorchEngine(Engine):
    """Steps a module with torch's own means; the weights are fp32."""

    def __init__(self, module: TrainingModule, optimizer: OptimizerSettings, accumulation: int):
        """accumulation: micro-batches per step."""
        self.model = module.model
        self._module = module
        self._optimizer = build_optimizer(self.model, optimizer)
        self._clipping = optimizer.gradient_clipping or float("inf")
        self._accumulation = accumulation
        self._norm: float | Tensor = 0.0

    def train_step(self, micro_batches: Iterable[MicroBatch], learning_rate: float, block: int | None = None,
                   judge: Judge | None = None) -> list[Loss]:
        self._optimizer.active_block = block
        set_learning_rate(self._optimizer, learning_rate)
        losses = []
        for tokens, random in micro_batches:
            loss = Loss(*self._module(tokens, random))
            (loss.value / self._accumulation).backward()
            losses.append(loss)
        self._norm = self._global(nn.utils.clip_grad_norm_(self.model.parameters(), self._clipping))
        if judge is not None:
            skip = judge(mean_loss(losses), self._norm)
            self._optimizer.must_skip = lambda: skip
        self._optimizer.step()
        self._optimizer.zero_grad()
        return losses

    def _global(self, norm: Tensor) -> Tensor:
        """A gradient norm of all ranks."""
        return norm

    @torch.no_grad()
    def held_out_nll(self, tokens: Tensor, random: SampleRandom) -> Tensor:
        return self._module(tokens, random, held_out=True)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}

    def warm_up(self, tokens: Tensor, random: SampleRandom) -> None:
        """UserError where the model is to be compiled and this machine cannot."""
        try:
            value, _ = self._module(tokens, random)
            value.backward()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(f"torch.compile failed ({first_line(error)}): install a C++ compiler, or set engine.compile=false") from error
        self._optimizer.zero_grad()

    def gradient_norm(self) -> float:
        return float(self._norm)

    def save(self, folder: Path) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "torch.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
