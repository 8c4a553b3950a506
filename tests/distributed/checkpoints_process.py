"""One process of test_checkpoints.py: saves with the other one, without a model, and holds both to the same answers."""

import errno
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from rdtrain.checkpoint import Checkpointer, CheckpointSettings
from rdtrain.checkpoint_storage import checkpoint_folder, checkpoint_steps, find_damage
from rdtrain.distributed import World, end_process, start_process_group
from rdtrain.errors import UserError

FOLDER = Path(sys.argv[-1])
RUN = FOLDER / "run"


def engine(rank: int, step: int) -> SimpleNamespace:
    tensors = {f"weight/{rank}": torch.full((1000,), float(step))}
    return SimpleNamespace(snapshot=lambda: tensors, weights=lambda: {"w": torch.ones(5)} if rank == 0 else {})


@contextmanager
def syncing(replacement):
    """Files that reach the disk in another way while the block lasts."""
    sync = os.fsync
    os.fsync = replacement
    try:
        yield
    finally:
        os.fsync = sync


def slowly(descriptor: int) -> None:
    time.sleep(0.5)


def onto_a_full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refusal(act) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def main() -> None:
    world = World.from_environment()
    start_process_group(world)
    (FOLDER / "tokenizer").write_bytes(b"pieces")

    def start() -> tuple[Checkpointer, int | None]:
        made = Checkpointer(RUN, CheckpointSettings(interval=1, keep=3), {"tokenizer.model": FOLDER / "tokenizer"}, world)
        return made, made.newest_whole()

    checkpoints, newest = start()
    assert newest is None
    with checkpoints:
        for step in (1, 2):
            checkpoints.save({"step": step}, engine(world.rank, step))
    assert checkpoint_steps(RUN) == [1, 2] and find_damage(checkpoint_folder(RUN, 2)) is None
    for rank in (0, 1):
        tensors = load_file(checkpoint_folder(RUN, 2) / f"shard-{rank}.safetensors")
        assert tensors.keys() == {f"weight/{rank}", f"generator/{rank}/cpu"} and tensors[f"weight/{rank}"].eq(2).all()
    world.barrier()

    # Rank 0 is done long before rank 1, and shows nothing before rank 1 is, which no collective call tells it.
    checkpoints, newest = start()
    assert newest == 2
    with syncing(slowly if world.rank == 1 else os.fsync):
        checkpoints.save({"step": 3}, engine(world.rank, 3))
        started = time.monotonic()
        while 3 not in checkpoint_steps(RUN):
            checkpoints.after_step()
            assert time.monotonic() < started + 60
            time.sleep(0.01)
        assert time.monotonic() > started + 0.5
        checkpoints.finish()
    assert find_damage(checkpoint_folder(RUN, 3)) is None

    # What one rank meets, both say where they wait for each other.
    with syncing(onto_a_full_disk if world.rank == 1 else os.fsync):
        checkpoints.save({"step": 4}, engine(world.rank, 4))
        sentences = world.gather(refusal(checkpoints.finish))
    assert sentences[0] == sentences[1] and "step 4 could not be written" in sentences[0] and "last whole one is of step 3" in sentences[0]
    assert checkpoint_steps(RUN) == [1, 2, 3]

    # The reading is shared, and a file that only one of them reads is damaged for both, of the newest and of the one before.
    if world.is_main:
        for step, name in ((3, "shard-0.safetensors"), (2, "shard-1.safetensors")):
            path = checkpoint_folder(RUN, step) / name
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    world.barrier()
    assert [bool(find_damage(checkpoint_folder(RUN, 3), rank=rank, ranks=2)) for rank in (0, 1)].count(True) == 1
    _, newest = start()
    assert newest == 1
    assert not list(RUN.glob("checkpoints/.step*"))
    world.barrier()
    if world.is_main:
        (checkpoint_folder(RUN, 1) / "state.json").unlink()
    world.barrier()
    sentences = world.gather(refusal(start))
    assert sentences[0] == sentences[1] and "none of the 3 checkpoints" in sentences[0]
    if world.is_main:
        (FOLDER / "right.txt").write_text("both ranks\n")
    end_process(0)


main()
