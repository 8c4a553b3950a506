"""Plain PyTorch in one process: the engine that every other is measured against."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..measurement import Place
from ..objectives import Loss
from ..optimization import OptimizerSettings, build_optimizer, set_learning_rate
from ..randomness import SampleRandom
from .base import Engine, Judge, MicroBatch, TrainingModule, differentiate, mean_loss
from .portable import Part, flat_part, gather, scatter


class TorchEngine(Engine):
    """Steps a module with torch's own means; the weights are fp32."""

    _rank, _ranks = 0, 1

    def __init__(self, module: TrainingModule, optimizer: OptimizerSettings, accumulation: int):
        """accumulation: micro-batches per step."""
        self.model = module.model
        self._module = module
        self._optimizer = build_optimizer(self.model, optimizer)
        self.measurement = self._optimizer.measurement = module.measurement
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

    def _pass_without_trace(self, tokens: Tensor, random: SampleRandom) -> None:
        value, _ = self._module(tokens, random)
        differentiate(value, self.model)

    def gradient_norm(self) -> float:
        return float(self._norm)

    def _places(self) -> Iterable[Place]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter, 0, (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()

    def _over_ranks(self, squares: Tensor) -> Tensor:
        return squares

    def snapshot(self) -> dict[str, Tensor]:
        self._optimizer.create_state()
        parameters = dict(self.model.named_parameters())
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        return gather(parameters, shapes, self._part, self._rank, self._ranks, sharded=self._ranks > 1)

    def restore(self, read: Callable[[str], Tensor]) -> None:
        self._optimizer.create_state()
        scatter(dict(self.model.named_parameters()), self._part, read)

    def _part(self, name: str) -> Part:
        parameter = self.model.get_parameter(name)
        return flat_part(0, parameter, self._optimizer.state[parameter])
