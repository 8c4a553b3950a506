"""The processes of a run: who this one is, and the few things that all of them say to each other.

The launchers (`deepspeed`, `torchrun`) describe the world in environment variables, and so does SLURM for the tasks of an `srun`; without
any of these a run is a world of one. What cannot be right is refused here, before a rank waits for others that will never come.
"""

import datetime
import hashlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

PROCESS_GROUP_MINUTES = 30
"""How long ranks wait for each other before a run is given up: generous, for a slow save or a first compile."""

LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""The variables of `deepspeed` and `torchrun`: a process's number, how many there are, and its number on its machine."""

SLURM_NAMES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
"""The same three, as `srun` tells them to its tasks."""

MASTER_PORT = 29500
"""Where rank 0 listens when SLURM's tasks are told nothing else: what torchrun and deepspeed take."""


@dataclass(frozen=True)
class World:
    """This process's place: global rank, number of ranks, rank on this machine, and device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE and LOCAL_RANK or, where no launcher has set them, what `srun` sets; one CUDA device a process where there
        is CUDA, else the CPU.

        A SLURM task's place is put into the launchers' variables, which torch and DeepSpeed read. UserError for variables that contradict
        each other or leave something out, and for a process without a GPU of its own where others have one.
        """
        rank, size, local_rank = _from_launcher() or _from_slurm() or (0, 1, 0)
        device = torch.device("cpu")
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"process {local_rank} of this machine has no GPU of its own, as it sees {torch.cuda.device_count()}: start one "
                    "process for each GPU and let each see all of them (under SLURM, by --gpus-per-node and not --gpus-per-task)",
                    everywhere=False,
                )
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


def _number(name: str) -> int:
    """The environment variable of that name. UserError when it is no whole number."""
    value = os.environ[name]
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, and it is '{value}': unset it, or correct the launcher")
    return int(value)


def _from_launcher() -> tuple[int, int, int] | None:
    """Rank, size and local rank by the variables of `deepspeed` and `torchrun`; None where there are none of them."""
    missing = [name for name in LAUNCHER_NAMES if name not in os.environ]
    if len(missing) == len(LAUNCHER_NAMES):
        return None
    if missing:
        given = ", ".join(name for name in LAUNCHER_NAMES if name not in missing)
        raise UserError(
            f"the environment has {given} and not {', '.join(missing)}: start with `deepspeed`, `torchrun` or `srun`, which set all of "
            "them, or unset them for a single process"
        )
    rank, size, local_rank = map(_number, LAUNCHER_NAMES)
    if not local_rank <= rank < size:
        raise UserError(
            f"the environment has RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={size}, which cannot be: give ranks from 0 to "
            f"{size - 1}, and on a machine numbers from 0 that are no larger", everywhere=False,
        )
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"the environment has WORLD_SIZE={size} and no MASTER_ADDR, so the processes cannot find each other: start with `deepspeed` or "
            "`torchrun`, or set MASTER_ADDR to the host of rank 0 on all of them"
        )
    if _in_srun():
        task = tuple(map(_number, SLURM_NAMES))
        tasks, elastic = task[1], "TORCHELASTIC_RUN_ID" in os.environ  # torchrun may number the nodes in an order of its own
        nodes = _number("SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in os.environ else tasks
        if 1 < tasks and task != (rank, size, local_rank) and (tasks > min(nodes, size) or (tasks == size and not elastic)):
            raise UserError(
                f"RANK={rank} of WORLD_SIZE={size} disagrees with SLURM, for which this is task {task[0]} of {tasks}: let srun start "
                "either one launcher a node (--ntasks-per-node=1) or the ranks themselves, without a launcher and without RANK",
                everywhere=False,
            )
    return rank, size, local_rank


def _in_srun() -> bool:
    """Whether srun started this process: the script of a batch job is told that it is task 0 as well, but belongs to no step."""
    return "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ


def _from_slurm() -> tuple[int, int, int] | None:
    """Rank, size and local rank of a SLURM task, which become those of the launchers' variables; None outside of SLURM."""
    if not all(name in os.environ for name in SLURM_NAMES):
        return None
    rank, size, local_rank = map(_number, SLURM_NAMES)
    if size > 1 and not _in_srun():
        raise UserError(
            f"this is the script of a SLURM job of {size} tasks and not one of them: start the training in it with srun, as "
            "launch/train.sbatch does"
        )
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"SLURM has started {size} tasks and MASTER_ADDR is not set, so they cannot find each other: set it to the host of task 0 in "
            "the job's script, as launch/train.sbatch does"
        )
    if size > 1:
        os.environ.update(zip(LAUNCHER_NAMES, map(str, (rank, size, local_rank))))
        os.environ.setdefault("MASTER_PORT", str(MASTER_PORT))
    return rank, size, local_rank


def present_device() -> str:
    """`cuda` where a run would use GPUs of this machine, else `cpu`; asks the driver for a list and leaves the GPUs alone."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"
    asked = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        return "cuda" if torch.cuda.is_available() else "cpu"
    finally:
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK")
        if asked is not None:
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = asked


def describe_lone_process() -> None:
    """Set the variables that a launcher would have set, where there was none: a world of one on a free port."""
    if {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
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


def end_process(code: int) -> None:
    """Leave the process group, if there is one, and end this process with that exit code; a process without a group goes on.

    It ends at once: gloo's threads outlive the group, and one that lets go of a tensor while Python shuts down aborts the process.
    """
    if dist.is_initialized():
        leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The same numbers in memory from which CUDA copies by itself; copying them there is better done in another thread than the loop's."""
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a thread begins with device 0
        return tensor.pin_memory()


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
