"""One portable form of weights and optimizer state, whatever the engine and the number of ranks.

An engine says where a rank keeps which elements of a parameter (`Part`); here whole tensors are made of the parts, and parts filled
again from whole tensors. One parameter is put together at a time, and each belongs to one rank, which alone receives it: so a rank holds
its share of the run, and never all of it unless it is alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError


@dataclass
class Part:
    """The elements of one parameter that this rank keeps: consecutive ones of the flattened parameter.

    start: the first of them.
    tensors: `weight`, `exp_avg` and `exp_avg_sq`, flat fp32 [elements], of one memory with what the optimizer works on; elements may be 0.
    step: AdamW's count of the parameter's steps, fp32 scalar; where an engine counts for many parameters at once they share it.
    """

    start: int
    tensors: dict[str, Tensor]
    step: Tensor


def flat_part(start: int, weight: Tensor, state: dict[str, Tensor], first: int = 0, elements: int | None = None) -> Part:
    """The part that lies at `first`, so many elements long, in a contiguous weight and the AdamW state of its shape."""
    tensors = {"weight": weight.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    elements = weight.numel() if elements is None else elements
    return Part(start, {kind: tensor.view(-1).narrow(0, first, elements) for kind, tensor in tensors.items()}, state["step"])


def owners(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """The rank that each parameter belongs to, in the order of `sizes` (elements by name), the same whoever asks.

    The largest goes first, and each to the rank that has least by then, so no rank has more than its even share and one parameter.
    """
    loads, chosen = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        chosen[name] = loads.index(min(loads))
        loads[chosen[name]] += sizes[name]
    return {name: chosen[name] for name in sizes}


def gather(parameters: dict[str, nn.Parameter], shapes: dict[str, torch.Size], part: Callable[[str], Part], rank: int, ranks: int,
           sharded: bool) -> dict[str, Tensor]:
    """`Engine.snapshot` of the parameters from all ranks' parts. Collective over the default process group where `sharded`; else each
    rank holds all, and only copies its share.
    """
    share = {}
    for name, owner in owners({name: shape.numel() for name, shape in shapes.items()}, ranks).items():
        if not sharded and owner != rank:
            continue
        mine = part(name)
        for kind, elements in mine.tensors.items():
            whole = _put_together(elements, mine.start, shapes[name], parameters[name].device, owner) if sharded else elements
            if owner == rank:
                share[f"{kind}/{name}"] = whole.to("cpu", copy=not sharded).view(shapes[name])
        if owner == rank:
            share[f"step/{name}"] = mine.step.to("cpu", copy=True)
    return share


def _put_together(elements: Tensor, start: int, shape: torch.Size, device: torch.device, owner: int) -> Tensor:
    """The whole tensor [shape.numel()] on the owner, to the bit: as integers, since -0.0 + 0.0 is not -0.0."""
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
    whole[start : start + elements.numel()] = elements
    dist.reduce(whole.view(torch.int32), owner)
    return whole


def scatter(names: Iterable[str], part: Callable[[str], Part], read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parts from whole tensors, and read none of which it has nothing.

    UserError where parameters whose steps the engine counts together have made different numbers of steps.
    """
    first: dict[int, tuple[str, Tensor]] = {}
    for name in names:
        mine = part(name)
        for kind, elements in mine.tensors.items():
            if elements.numel():
                elements.copy_(read(f"{kind}/{name}").flatten()[mine.start : mine.start + elements.numel()])
        step = read(f"step/{name}")
        before, counted = first.setdefault(id(mine.step), (name, step))
        if counted != step:
            raise UserError(
                f"{before} has made {int(counted)} optimizer steps and {name} {int(step)}, which ZeRO counts together: continue with "
                "engine.name=fsdp or engine.name=torch"
            )
        mine.step.copy_(step)
