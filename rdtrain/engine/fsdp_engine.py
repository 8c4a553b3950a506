"""FSDP2, torch's `fully_shard`: weights, gradients and optimizer state each lie on one rank only, a part on every rank.

A layer's weights are gathered when it runs and dropped after it. The embedding, which the tied head and the objectives use too, lies in
the root's group with the norms and adapters, and stays whole from the start of a pass to its end. So do the layers of the core
where an objective runs it many times over: it is gathered and its gradient reduced once, not K times. A block that a step does not
train has no gradient at all, so it needs no more than BlockAdamW. On one rank all this computes what plain PyTorch does.

What gathers and drops a layer's weights are hooks of the module, called around its `forward`. So it is that function which is compiled, and
not the module (`nn.Module.compile` takes the hooks along, which cannot be compiled).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..distributed import World
from ..model.layers import SandwichBlock
from ..model.recurrent import RecurrentDepthLM
from ..objectives import Objective
from ..optimization import OptimizerSettings
from ..randomness import SampleRandom
from .base import TrainingModule
from .portable import Part, flat_part
from .torch_engine import TorchEngine


def sharded_layers(model: RecurrentDepthLM, objective: Objective) -> list[SandwichBlock]:
    """The layers that are sharded each by itself; the rest of the model is the root's group."""
    repeated = set(model.cores.modules()) if objective.repeats_core else set()
    return [part for part in model.modules() if isinstance(part, SandwichBlock) and part not in repeated]


def shard(module: TrainingModule, world: World, dtype: torch.dtype) -> None:
    """Shard a module in place over all ranks. dtype: what passes compute in; gradients are reduced and kept in fp32."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs are left alone: sigma, the rotary table and the preconditioned state are fp32 in every precision.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in sharded_layers(module.model, module.objective):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


class FSDPEngine(TorchEngine):
    """The default process group must stand."""

    def __init__(self, module: TrainingModule, optimizer: OptimizerSettings, accumulation: int, world: World, dtype: torch.dtype):
        shard(module, world, dtype)
        super().__init__(module, optimizer, accumulation)
        self._rank, self._ranks = world.rank, world.size

    def _global(self, norm: DTensor) -> Tensor:
        return norm.full_tensor()

    def _over_ranks(self, squares: Tensor) -> Tensor:
        dist.all_reduce(squares)
        return squares

    def _pass_without_trace(self, tokens: Tensor, random: SampleRandom) -> None:
        """Gradients are those of gathered weights, which come and go with a pass: they take all their way, and are dropped at its end."""
        value, _ = self._module(tokens, random)
        value.backward()
        self._optimizer.zero_grad()

    def held_out_nll(self, tokens: Tensor, random: SampleRandom) -> Tensor:
        nll = super().held_out_nll(tokens, random)
        self._module.reshard()  # the root's group, which waits for a backward pass
        return nll

    def weights(self) -> dict[str, Tensor]:
        whole = {}
        for name, tensor in self.model.state_dict().items():
            tensor = tensor.full_tensor()
            if self._rank == 0:
                whole[name] = tensor.cpu()
        return whole

    def _part(self, name: str) -> Part:
        parameter = self.model.get_parameter(name)
        rows = math.ceil(parameter.shape[0] / self._ranks)  # fully_shard divides the first dimension, as torch.chunk does
        start = min(self._rank * rows, parameter.shape[0]) * parameter.shape[1:].numel()
        state = self._optimizer.state[parameter]
        local = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}
        return flat_part(start, parameter.detach().to_local(), local)
