"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-00000200/
      state.json         step, seconds trained, model, objective and its state, tokenizer hash, ranks: what a loader checks first
      model.safetensors  the weights, whole and once; with the tokenizer, what `rdtrain export` reads
      tokenizer.model    the tokenizer of the shards
      shard-RANK.safetensors  the rank's share of fp32 weights and optimizer state, whole tensors by name (Engine.snapshot)
      random-RANK.pt     the rank's torch generators

A checkpoint is written under a temporary name and renamed when every rank has finished, so one that can be seen is whole, and a
failed save leaves the one before it untouched.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .distributed import World
from .engine import Engine
from .errors import UserError, first_line
from .model.recurrent import ModelConfig, RecurrentDepthLM


@dataclass
class CheckpointSettings:
    """When the state is saved, and what a new run starts from.

    interval: steps between two checkpoints; the last step is always saved.
    keep: how many of the newest stay on disk.
    start_from: a checkpoint folder whose weights a new run begins with; empty for none.
    """

    interval: int = 500
    keep: int = 2
    start_from: str = ""

    def __post_init__(self):
        """ValueError for checkpoints that never come or never stay."""
        if self.interval < 1 or self.keep < 1:
            raise ValueError("interval and keep must be at least 1")


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_folder: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    names = (path.parent.name for path in run_folder.glob("checkpoints/step-*/state.json"))
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))


def save_checkpoint(run_folder: Path, state: dict, engine: Engine, tokenizer: Path, keep: int, world: World) -> None:
    """Save on all ranks, rename, and drop all but the newest `keep`.

    state must hold `step`; tokenizer is the model file. UserError when a file cannot be written, on the ranks where it cannot; the
    half-written folder is removed.
    """
    target = checkpoint_folder(run_folder, state["step"])
    temporary = target.with_name(f".{target.name}.saving")
    try:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        world.barrier()
        save_file(engine.snapshot(), temporary / f"shard-{world.rank}.safetensors")
        torch.save(_random_state(world), temporary / f"random-{world.rank}.pt")
        weights = engine.weights()
        if world.is_main:
            save_file(weights, temporary / "model.safetensors")
            shutil.copyfile(tokenizer, temporary / "tokenizer.model")
            (temporary / "state.json").write_text(json.dumps(state, indent=2))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        steps = checkpoint_steps(run_folder)
        kept = f"the last whole one is of step {steps[-1]}" if steps else "there is none before it"
        reason = first_line(error)
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written to {target.parent} ({reason}), and {kept}: free some disk "
            "space there and start the same command again to continue",
            everywhere=False,
        ) from error
    world.barrier()
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for step in checkpoint_steps(run_folder)[:-keep]:
            shutil.rmtree(checkpoint_folder(run_folder, step))


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint. UserError when the folder is not one."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if {"step", "seconds", "model", "noise", "objective", "objective_state", "precision", "tokenizer_hash", "ranks"} <= state.keys():
            return state
        raise ValueError
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{folder} is not an rdtrain checkpoint (no readable state.json): give a folder such as RUN/checkpoints/step-00000100"
        ) from None


def refuse_other_model(folder: Path, config: ModelConfig, tokenizer_hash: str) -> None:
    """UserError when the checkpoint in `folder` is of another model than `config`, or of another tokenizer."""
    state = read_state(folder)
    for name, ours in dataclasses.asdict(config).items():
        theirs = state["model"].get(name)
        if theirs != ours:
            raise UserError(
                f"checkpoint {folder} is of another model ({name} is {theirs} there and {ours} here): "
                "start from a checkpoint of this model, or change the config to match"
            )
    if state["tokenizer_hash"] != tokenizer_hash:
        raise UserError(
            f"checkpoint {folder} was trained with tokenizer {state['tokenizer_hash'][:12]}, and the shards were written with "
            f"{tokenizer_hash[:12]}: use shards of the checkpoint's tokenizer, which lies in that folder"
        )


def load_weights(folder: Path, model: RecurrentDepthLM) -> None:
    """Load model.safetensors of a checkpoint. UserError when it is missing or damaged."""
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be loaded ({reason}): the file is damaged or missing; use another checkpoint") from None


def load_checkpoint(folder: Path, engine: Engine, tokenizer_hash: str, world: World) -> dict:
    """Restore engine and generators on every rank, whichever engine and ranks wrote the checkpoint; returns the state.

    A rank that had no part in writing keeps its generators. UserError when the checkpoint does not fit the run.
    """
    refuse_other_model(folder, engine.model.config, tokenizer_hash)
    state = read_state(folder)
    generators = folder / f"random-{world.rank}.pt"
    random_state = {}
    try:
        with ExitStack() as opened:
            engine.restore(_reader(folder, opened))
        if generators.exists():
            random_state = torch.load(generators, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # every library has exceptions of its own for a damaged file
        reason = first_line(error)
        raise UserError(
            f"checkpoint {folder} cannot be loaded ({reason}): it is damaged; delete that folder to continue from the one before",
            everywhere=False,
        ) from error
    if "cpu" in random_state:
        torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and world.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"])
    return state


def _reader(folder: Path, opened: ExitStack) -> Callable[[str], Tensor]:
    """A function that reads one tensor by name from whichever rank's share holds it, while `opened` is open."""
    files = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        file = opened.enter_context(safe_open(path, "pt"))
        files |= dict.fromkeys(file.keys(), file)
    return lambda name: files[name].get_tensor(name)


def _random_state(world: World) -> dict:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state
