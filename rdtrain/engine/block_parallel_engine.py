"""Block-parallel training: each group of ranks trains an untied block of its own, in every step, and no other group knows its core.

The ranks form B groups of G, one for each block, by rank: a machine's ranks stay together, and so does most of the traffic. A rank
holds the parts that all blocks share and its group's core: no weight, gradient or optimizer state of another. Two messages make a
step: the core's gradient, averaged inside the group, which travels while the prelude's backward pass runs, and the gradient of the
shared parts, averaged over all ranks.

What a step means. The objective is sum_b p_b L_b(shared, core_b), where p_b is how often other engines draw block b. Here each block
gets 1 / B of the sequences, so a rank of block b weighs its gradient of the shared parts by w_b = B p_b: the average over all ranks is
then sum_b p_b dL_b, the objective's own gradient, without the noise of drawing the block. The core's gradient is dL_b, as where its
block is drawn; the factor p_b that the objective has there would divide out in Adam. docs/method.md derives both, and the norm.
"""

import datetime
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import PROCESS_GROUP_MINUTES, World
from ..measurement import GRADIENT, NAMES
from ..model.recurrent import RecurrentDepthLM
from ..objectives import Loss
from ..optimization import OptimizerSettings, set_learning_rate
from ..randomness import SampleRandom
from .base import Judge, MicroBatch, TrainingModule, mean_loss
from .portable import gather
from .torch_engine import TorchEngine


class Elsewhere(nn.Module):
    """Stands in the model for a core that another group holds, so that blocks keep their numbers and weights their names."""

    def forward(self, *_):
        """AssertionError: there is nothing here to run."""
        raise AssertionError("this block's core lies on other ranks")


def own_block(blocks: int, world: World) -> int:
    """The block of this rank's group; `blocks` must divide the number of ranks."""
    return world.rank * blocks // world.size


def keep_own_block(model: RecurrentDepthLM, world: World) -> None:
    """Drop the cores of the other groups from a whole model, in place."""
    for block in range(len(model.cores)):
        if block != own_block(len(model.cores), world):
            model.cores[block] = Elsewhere()


class FlatGradients:
    """The gradients of some parameters as one fp32 tensor, which is one message; each parameter's `grad` is a view of it."""

    def __init__(self, parameters: Iterable[nn.Parameter], room: int = 0):
        """room: numbers more that the message carries at its end."""
        self.parameters = list(parameters)
        self.count = sum(parameter.numel() for parameter in self.parameters)
        self.message = torch.zeros(self.count + room, dtype=torch.float32, device=self.parameters[0].device)
        self.gradients = self.message[: self.count]
        for parameter, part in zip(self.parameters, self.gradients.split([p.numel() for p in self.parameters])):
            parameter.grad = part.view_as(parameter)


class BlockParallelEngine(TorchEngine):
    """One group's part of a model with untied blocks; the default process group must stand."""

    def __init__(self, module: TrainingModule, optimizer: OptimizerSettings, accumulation: int, world: World):
        """The module's model must have been through `keep_own_block`; its objective is told the block. Collective."""
        super().__init__(module, optimizer, accumulation)
        self._world, cores = world, self.model.cores
        self.block, self._group_ranks = own_block(len(cores), world), world.size // len(cores)
        self._weight = module.objective.train_only(self.block)
        self._optimizer.create_state()
        self._group = None
        for first in range(0, world.size, self._group_ranks):  # every rank must take part in making every group
            ranks, timeout = list(range(first, first + self._group_ranks)), datetime.timedelta(minutes=PROCESS_GROUP_MINUTES)
            group = dist.new_group(ranks, timeout) if len(ranks) > 1 else None
            self._group = group if world.rank in ranks else self._group
        self._core = FlatGradients(cores[self.block].parameters())
        self._shared = FlatGradients((p for name, p in self.model.named_parameters() if not name.startswith("cores.")), room=1)
        self._reduction: dist.Work | None = None
        self._awaited = 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._core_gradient_ready) for p in self._core.parameters]
        self.facts = {"block_parallel": self._facts()}

    def _facts(self) -> dict:
        """Bytes that this rank holds, and that it puts into the messages of a step: the same on every rank, as cores are of one size."""
        held = {
            "weights": sum(parameter.nbytes for parameter in self.model.parameters()),
            "gradients": self._core.message.nbytes + self._shared.message.nbytes,
            "optimizer_state": sum(tensor.nbytes for state in self._optimizer.state.values() for tensor in state.values()),
        }
        reduced = {"core": self._core.message.nbytes * (self._group is not None), "shared": self._shared.message.nbytes}
        return {"group_ranks": self._group_ranks, "reduced_bytes_per_step": reduced, "held_bytes_per_rank": held}

    def _core_gradient_ready(self, parameter: nn.Parameter) -> None:
        """Called for each parameter of the core in each backward pass: with the step's last one the core's gradient sets off."""
        self._awaited -= 1
        if self._awaited == 0 and self._group is not None:
            self._reduction = dist.all_reduce(self._core.message, group=self._group, async_op=True)

    def train_step(self, micro_batches: Iterable[MicroBatch], learning_rate: float, block: int | None = None,
                   judge: Judge | None = None) -> list[Loss]:
        """block: None, as all are trained."""
        assert block is None, f"block {block} alone cannot be trained"
        set_learning_rate(self._optimizer, learning_rate)
        self._core.message.zero_()
        self._shared.message.zero_()
        self._awaited = self._accumulation * len(self._core.parameters)
        losses = []
        for tokens, random in micro_batches:
            loss = Loss(*self._module(tokens, random))
            (loss.value / self._accumulation).backward()
            losses.append(loss)
        self._average()
        clipping = (self._clipping / (self._norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        self._core.gradients.mul_(clipping)
        self._shared.gradients.mul_(clipping)
        if judge is not None:
            skip = judge(mean_loss(losses), self._norm)
            self._optimizer.must_skip = lambda: skip
        self._optimizer.step()
        return losses

    def _average(self) -> None:
        """The core's gradient over the group, that of the shared parts over all ranks by weight, and the norm of both."""
        assert self._awaited == 0, f"{self._awaited} gradients of the core are missing"
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        self._core.gradients.div_(self._group_ranks)
        # Each rank of block b adds |core_b|^2 with the weight of its gradient, B p_b / W: over the G = W / B of them p_b |core_b|^2.
        self._shared.message[-1] = torch.linalg.vector_norm(self._core.gradients).square()
        self._shared.message.mul_(self._weight / self._world.size)
        dist.all_reduce(self._shared.message)
        self._norm = (torch.linalg.vector_norm(self._shared.gradients).square() + self._shared.message[-1]).sqrt()

    def _over_ranks(self, squares: Tensor) -> Tensor:
        """All have the shared parts' alike. Of the cores' gradients as the norm has them, and of updates and weights all cores' sum."""
        weights = torch.full_like(squares[0], 1 / self._group_ranks)
        weights[GRADIENT] = self._weight / self._world.size
        core = squares[NAMES.index("core")]
        core.mul_(weights)
        dist.all_reduce(core)
        return squares

    def close(self) -> None:
        """Autograd keeps hooks, and with them the engine, where the garbage collector does not look."""
        for hook in self._hooks:
            hook.remove()

    def weights(self) -> dict[str, Tensor]:
        """On rank 0 for the time of a save the cores of all blocks, on the CPU."""
        whole = {name: parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        shapes = {name.split(".", 2)[2]: tensor for name, tensor in whole.items() if name.startswith("cores.")}
        for block in range(1, len(self.model.cores)):
            sender = block * self._group_ranks
            if self._world.rank == sender:
                dist.send(nn.utils.parameters_to_vector(self._core.parameters).detach(), 0)
            elif self._world.is_main:
                flat = torch.empty_like(self._core.gradients)
                dist.recv(flat, sender)
                parts = flat.cpu().split([tensor.numel() for tensor in shapes.values()])
                whole |= {f"cores.{block}.{name}": part.view_as(like).clone() for part, (name, like) in zip(parts, shapes.items())}
        return whole if self._world.is_main else {}

    def held_out_nll(self, tokens: Tensor, random: SampleRandom) -> Tensor:
        """Of block 0's ranks alone, as its core serves sigma_max; the others compute nothing and return NaN. No rank waits for another."""
        if self.block:
            return torch.full(tokens[:, 1:].shape, torch.nan, device=tokens.device)
        return super().held_out_nll(tokens, random)

    def snapshot(self) -> dict[str, Tensor]:
        """The ranks of a group share its core out among them, and all ranks the rest."""
        named, share, rank = dict(self.model.named_parameters()), {}, self._world.rank
        for of_core, place, ranks in ((True, rank % self._group_ranks, self._group_ranks), (False, rank, self._world.size)):
            parameters = {name: parameter for name, parameter in named.items() if name.startswith("cores.") == of_core}
            shapes = {name: parameter.shape for name, parameter in parameters.items()}
            share |= gather(parameters, shapes, self._part, place, ranks, sharded=False)
        return share
