"""Where the memory of a training step goes, measured.

Weights, gradients and optimizer state are tensors that can be found, and are counted. What passes hold besides them is what the
allocator has handed out at certain moments: the start of a micro-batch, the end of its forward pass, the optimizer's step. On CUDA torch
counts that as it goes; on the CPU it reports every allocation to its profiler, and the sums are made afterwards.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from ..model.recurrent import RecurrentDepthLM
from ..objectives import Loss, Objective
from ..objectives.cuda_graph import captured_bytes
from ..randomness import SampleRandom

PREFIX = "rdtrain: "


@dataclass
class StepMemory:
    """Bytes on this rank's device.

    weights: those that run and, where they are not the same, the fp32 ones that are stepped.
    gradients: what the optimizer steps by, as it does.
    optimizer_state: AdamW's moments, and step counts.
    activations: what is held at the end of a micro-batch's forward pass for its backward pass: saved tensors, logits, copies of weights
        that autocast makes. None where CUDA graphs keep it, with the rest of what the passes take, from one step to the next.
    passes: the most that a micro-batch's passes take beside all that was there at its start, gradients as they come among it.
    peak: the most that is allocated at any moment of a step.
    host: of all these, what lies in the CPU's memory while the device is another (offload_optimizer).
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int | None
    passes: int
    peak: int
    host: int


@dataclass
class Mark:
    """A moment of a step: its name, bytes allocated then, and the most allocated since the mark before. On the CPU both are counted from
    the first mark on."""

    name: str
    allocated: int
    peak: int


class CudaMarks:
    """Marks by the counters of CUDA's allocator."""

    def __init__(self, device: torch.device):
        self.marks: list[Mark] = []
        self._device = device

    @contextmanager
    def watching(self):
        torch.cuda.reset_peak_memory_stats(self._device)
        yield

    def mark(self, name: str) -> None:
        self.marks.append(Mark(name, torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)))
        torch.cuda.reset_peak_memory_stats(self._device)


class CpuMarks:
    """Marks by the allocations that torch reports to its profiler."""

    def __init__(self):
        self.marks: list[Mark] = []

    @contextmanager
    def watching(self):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        allocated = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                allocated += event.nbytes()
                peak = max(peak, allocated)
            elif event.name().startswith(PREFIX):
                if not self.marks:
                    allocated = peak = 0
                self.marks.append(Mark(event.name().removeprefix(PREFIX), allocated, peak))
                peak = allocated

    def mark(self, name: str) -> None:
        with record_function(PREFIX + name):
            pass


class WatchedObjective:
    """An objective that says when a micro-batch's forward pass begins and ends, to whoever is listening; else it is the objective."""

    def __init__(self, objective: Objective):
        self._objective = objective
        self.listener: Callable[[str], None] | None = None

    def __getattr__(self, name: str):
        return getattr(self._objective, name)

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        self._say("pass")
        loss = self._objective(model, tokens, random)
        self._say("forward")
        return loss

    def _say(self, name: str) -> None:
        if self.listener is not None:
            self.listener(name)


def tensor_bytes(tensors: Iterable[Tensor | None], device_type: str) -> int:
    """Bytes of the memory that tensors lie in on a kind of device, each once; of a sharded one this rank's part."""
    found = {}
    for tensor in tensors:
        for each in (tensor, getattr(tensor, "ds_tensor", None)):  # ZeRO-3 keeps its part beside an empty tensor
            if each is not None:
                local = each.to_local() if isinstance(each, DTensor) else each
                if local.device.type == device_type:
                    found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    found.pop(0, None)
    return sum(found.values())


def measure_memory(step: Callable[[], None], objective: WatchedObjective, model: RecurrentDepthLM, device: torch.device) -> StepMemory:
    """Memory of one step, which `step` makes. The engine must have made steps before, so that what it keeps is there."""
    marks = CudaMarks(device) if device.type == "cuda" else CpuMarks()
    kinds: dict[str, dict[str, int]] = {}
    marked = False

    def at_optimizer(optimizer: torch.optim.Optimizer, arguments: tuple, keywords: dict) -> None:
        nonlocal marked
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors = {
            "weights": [*model.parameters(), *stepped, *optimizer.state],
            "gradients": [parameter.grad for parameter in (*model.parameters(), *stepped)],
            "optimizer_state": [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)],
        }
        for kind, found in tensors.items():
            sizes = kinds.setdefault(kind, {})
            for place in {device.type, "cpu"}:  # ZeRO-3 steps one group after another
                sizes[place] = max(sizes.get(place, 0), tensor_bytes(found, place))
        if not marked:
            marks.mark("optimizer")
            marked = True

    objective.listener = marks.mark
    hook = register_optimizer_step_pre_hook(at_optimizer)
    try:
        with marks.watching():
            marks.mark("start")
            step()
            marks.mark("end")
    finally:
        hook.remove()
        objective.listener = None
    here = {kind: sizes[device.type] for kind, sizes in kinds.items()}
    before = 0 if device.type == "cuda" else here["weights"] + here["optimizer_state"]  # what the CPU's marks are counted from
    activations = passes = 0
    for mark, end, following in zip(marks.marks, marks.marks[1:], marks.marks[2:]):
        if (mark.name, end.name) == ("pass", "forward"):
            activations = max(activations, end.allocated - mark.allocated)
            passes = max(passes, max(end.peak, following.peak) - mark.allocated)
    captured = captured_bytes(device)
    return StepMemory(
        **here, activations=None if captured else activations, passes=passes + captured,
        peak=before + max(mark.peak for mark in marks.marks[1:]) + captured,
        host=0 if device.type == "cpu" else sum(sizes["cpu"] for sizes in kinds.values()),
    )
