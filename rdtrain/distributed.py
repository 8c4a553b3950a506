"""The processes of a run: who this one is, and the few things that all of them say to each other.

The launchers (`deepspeed`, `torchrun`) describe the world in environment variables; without them a run is a world of one.
"""

import datetime
import os
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

PROCESS_GROUP_MINUTES = 30
"""How long ranks wait for each other before a run is given up: generous, for a slow save or a first compile."""


@dataclass(frozen=True)
class World:
    """This process's place: global rank, number of ranks, rank on this machine, and device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; one CUDA device a process where there is CUDA, else the CPU."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cpu")
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        return cls(rank, size, local_rank, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, value: float) -> float:
        """The largest of the ranks' values."""
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, value: object) -> list:
        """One Python object from every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def describe_lone_process() -> None:
    """Set the variables that a launcher would have set, where there was none: a world of one on a free port."""
    if "MASTER_ADDR" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def backend(device: torch.device) -> str:
    """The process group's backend: NCCL on CUDA, gloo on CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def start_process_group(world: World) -> None:
    """Start the default process group, unless it stands already."""
    if not dist.is_initialized():
        describe_lone_process()
        dist.init_process_group(backend(world.device), timeout=datetime.timedelta(minutes=PROCESS_GROUP_MINUTES))


def leave() -> None:
    """Leave the process group, if there is one, once all ranks are done with it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _read_later(number: Tensor) -> Callable[[], float]:
    """A function that waits for a number as it is now, and for nothing that the device is given to do after it.

    `item` would wait for all of that, since its copy queues up behind it.
    """
    if number.device.type != "cuda":
        return number.item
    on_host, arrived = torch.empty((), dtype=number.dtype, pin_memory=True), torch.cuda.Event()
    on_host.copy_(number, non_blocking=True)
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return on_host.item()

    return read


@contextmanager
def stop_signals(world: World):
    """Turn SIGINT and SIGTERM into a question that all ranks answer alike.

    Yields `agreed() -> bool`, to be called once a step by every rank: true from the step after the one in which any rank was
    signalled. The answer of a step is read one step later, so that a CUDA device always has a step to work on meanwhile.
    """
    received = False
    pending: Callable[[], float] | None = None

    def receive(signum, frame):
        nonlocal received
        received = True

    def agreed() -> bool:
        nonlocal pending
        before, pending = pending, _read_later(world.sum(torch.full((), float(received), device=world.device)))
        return before is not None and before() > 0

    previous: dict[int, Callable] = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield agreed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
