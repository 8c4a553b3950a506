"""The processes of a run: who this one is, and the few things that all of them say to each other.

The launchers (`deepspeed`, `torchrun`) describe the world in environment variables; without them a run is a world of one.
"""

import datetime
import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

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


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copied from the CPU without waiting for the work that the device still has to do, which only pinned memory allows."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read_later(tensor: Tensor) -> Callable[[], list]:
    """A function that waits for a tensor as it is now, and for nothing that the device is given to do after it.

    `tolist` would wait for all of that, since its copy queues up behind it.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    on_host, arrived = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), torch.cuda.Event()
    on_host.copy_(tensor, non_blocking=True)
    arrived.record()

    def read() -> list:
        arrived.synchronize()
        return on_host.tolist()

    return read


def agree(world: World, work: str, plan: object, stop: int) -> Callable[[], int]:
    """Tell all ranks what this one is about to do, and whether it was asked to stop; one small all-reduce. Collective.

    work: what it is called, for example `step 12`. plan: anything whose `repr` says what all ranks must do alike. stop: 0, or the exit code
    to stop with. Returns a function that waits for the answer: the largest code of all ranks. It is to be called once the work is enqueued,
    so that a CUDA device has something to do meanwhile. UserError when the plans differ, from here where the answer is there at once.
    """
    if world.size == 1:
        return lambda: stop
    number = int.from_bytes(hashlib.blake2b(repr(plan).encode(), digest_size=7).digest(), "little")
    values = on_device(torch.tensor([stop, number, -number]), world.device)  # the largest -number is the smallest number's
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    read = read_later(values)

    def answer() -> int:
        code, largest, smallest = read()
        if largest != -smallest:
            raise UserError(
                f"the ranks do not agree on {work} (its number, samples, learning rate, or the depth or block that is drawn): start all of "
                "them with the same command, code and data, and continue from the last checkpoint"
            )
        return code

    if world.device.type != "cuda":
        answer()
    return answer
