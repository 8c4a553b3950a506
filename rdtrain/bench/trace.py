"""What a device does in a step, by torch's profiler: for how long it is busy, with which kernels, and for how long with messages alone."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COSTLIEST = 10
ATTENTION = re.compile("flash|fmha|sdpa|attention", re.IGNORECASE)
MESSAGE = re.compile("nccl", re.IGNORECASE)
COPY = re.compile("Memcpy|Memset")


@dataclass
class Kernel:
    """A kernel, or on the CPU an operator, by name: how often it runs in a step, for how many seconds, and its share of all of them."""

    name: str
    calls: float
    seconds: float
    share: float


@dataclass
class Trace:
    """Of a step, the mean over those that were profiled.

    busy_seconds: CUDA: for how long the device had any kernel or copy to run; None on the CPU, and where the profiler saw no kernels.
    message_seconds, exposed_seconds: the same of NCCL's kernels, which wait for other ranks too, and of those when no other kernel runs.
    kernels: the costliest, costliest first.
    attention: names of the attention kernels among all.
    launches: kernels and copies, or on the CPU operators.
    """

    busy_seconds: float | None = None
    message_seconds: float | None = None
    exposed_seconds: float | None = None
    kernels: list[Kernel] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    launches: float = 0.0


def trace_steps(step: Callable[[], None], steps: int, device: torch.device, host: bool, path: Path | None = None) -> Trace:
    """Profile some steps. host: what the CPU does as well, which slows it. path: of a Chrome trace to write, ending in .json.gz."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] * cuda + [ProfilerActivity.CPU] * (host or not cuda)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))
    seconds, calls, ran = Counter(), Counter(), []
    if cuda:
        for event in profiler.events():
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                ran.append((event.name, event.time_range.start, event.time_range.end))
                seconds[event.name] += 1e-6 * event.time_range.elapsed_us()
                calls[event.name] += 1
    else:
        for average in profiler.key_averages():
            seconds[average.key] += 1e-6 * average.self_cpu_time_total
            calls[average.key] += average.count
    total = sum(seconds.values())
    kernels = [Kernel(name, calls[name] / steps, spent / steps, spent / total) for name, spent in seconds.most_common(COSTLIEST)]
    of_step = [1e-6 * length / steps if ran else None for length in lengths(ran)]
    attention = sorted(name for name in seconds if ATTENTION.search(name))
    return Trace(*of_step, kernels, attention, calls.total() / steps)


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def lengths(ran: list[tuple[str, float, float]]) -> tuple[float, float, float]:
    """Of the kernels and copies (name, start, end) that a device ran: for how long it ran any, a kernel of NCCL's, and one of these while
    no other kernel ran. A copy hides no message, as it computes nothing."""
    messages = [(start, end) for name, start, end in ran if MESSAGE.search(name)]
    computing = [(start, end) for name, start, end in ran if not MESSAGE.search(name) and not COPY.match(name)]
    exposed = covered(messages + computing) - covered(computing)
    return covered([(start, end) for _, start, end in ran]), covered(messages), exposed


def write_memory_snapshot(step: Callable[[], None], path: Path) -> None:
    """Write a step's CUDA allocations with their stacks, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        step()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
