"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-00000200/
      state.json              step, seconds trained, model, objective and its state, config, versions: what a loader checks first
      model.safetensors       the weights, whole and once; with the tokenizer, what `rdtrain export` reads
      tokenizer.model         the tokenizer of the shards (or tokenizer.json)
      shard-RANK.safetensors  the rank's share of weights and optimizer state (Engine.snapshot), and its torch generators
      manifest.json           size and checksum of every file

checkpoint_storage.py says how such a folder comes to be whole. While a background thread writes what was copied from the engine, training
goes on; the thread makes no collective call, for those of gloo and NCCL may come from one thread only. After every step a rank sees
whether its own thread has failed, and rank 0 also looks in the folder whether all ranks have written theirs. Ranks wait for each other
only where all of them do: at the next save, at the last one and when they are asked to stop.
"""

import dataclasses
import json
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint_storage import (
    Entry,
    checkpoint_folder,
    checkpoint_steps,
    find_damage,
    open_tensors,
    publish,
    remove,
    sweep,
    temporary_folder,
    write_files,
    written_files,
)
from .distributed import World
from .engine import Engine
from .errors import UserError, first_line
from .model.recurrent import ModelConfig, RecurrentDepthLM


@dataclass
class CheckpointSettings:
    """When the state is saved, and what a new run starts from.

    interval: steps between two checkpoints; the last step is always saved.
    keep: how many of the newest stay on disk.
    keep_every: checkpoints of a step that this divides stay for ever; a multiple of interval, or 0 for none.
    asynchronous: training goes on while a checkpoint is written, which takes as much of the CPU's memory as the checkpoint has bytes.
    start_from: a checkpoint folder whose weights a new run begins with; empty for none.
    """

    interval: int = 500
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    start_from: str = ""

    def __post_init__(self):
        """ValueError for checkpoints that never come or never stay."""
        if self.interval < 1 or self.keep < 1:
            raise ValueError("interval and keep must be at least 1")
        if self.keep_every < 0 or self.keep_every % self.interval:
            raise ValueError(f"keep_every must be 0 or a multiple of interval={self.interval}, and it is {self.keep_every}")


class Checkpointer:
    """The checkpoints of a run, on every rank; a context manager, at whose end the save in flight is waited for."""

    def __init__(self, run_folder: Path, settings: CheckpointSettings, tokenizer: dict[str, bytes | Path], world: World):
        """tokenizer: its file's name, with the file or its content, of which every checkpoint holds a copy."""
        self._run_folder, self._settings, self._tokenizer, self._world = run_folder, settings, tokenizer, world
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[dict[str, Entry]] | None = None  # of step _step, into _temporary
        self._step, self._temporary, self._published = 0, Path(), False
        self._damaged: set[int] = set()
        self._start = 0

    def newest_whole(self) -> int | None:
        """The step of the newest checkpoint that is whole, the same on all ranks, which share the reading; None in a new run. Collective.

        Damaged ones before it are passed over with a warning for each. UserError when there are checkpoints and none is whole. What
        killed processes left half-written is deleted.
        """
        if self._world.is_main:
            sweep(self._run_folder)
        # Rank 0 speaks for all, since it has the run's lock. A rank of a killed start may live on and write: not into this one's folders.
        steps, self._start = self._world.gather((checkpoint_steps(self._run_folder), time.time_ns()))[0]
        damages = {}
        for step in reversed(steps):
            folder = checkpoint_folder(self._run_folder, step)
            found = self._world.gather(find_damage(folder, rank=self._world.rank, ranks=self._world.size))
            damage = next(filter(None, found), None)
            if damage is None:
                self._damaged = set(damages)
                if self._world.is_main:
                    for other, damage in damages.items():
                        print(
                            f"warning: checkpoint {checkpoint_folder(self._run_folder, other)} is damaged ({damage}), and the run "
                            f"continues from the one of step {step}", file=sys.stderr,
                        )
                return step
            damages[step] = damage
        if damages:
            raise UserError(
                f"none of the {len(damages)} checkpoints in {self._run_folder / 'checkpoints'} is whole (of step {steps[-1]}, "
                f"{damages[steps[-1]]}): put back a copy of one, or delete that folder to train from the start"
            )
        return None

    def load(self, step: int, engine: Engine, tokenizer_hash: str) -> dict:
        """Restore engine and generators on every rank; returns the state. UserError when it does not fit the run. Collective."""
        folder = checkpoint_folder(self._run_folder, step)
        refuse_other_model(folder, engine.model.config, tokenizer_hash)
        state = read_state(folder)
        try:
            with open_tensors(folder, "shard-*.safetensors") as tensors:
                engine.restore(lambda name: tensors[name]())
                self._restore_generators(tensors)
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"checkpoint {folder} cannot be loaded ({first_line(error)}): see that its disk can be read, or delete that folder to "
                "continue from the one before", everywhere=False,
            ) from error
        return state

    def save(self, state: dict, engine: Engine) -> None:
        """Copy what the run needs and write it, in the background where the settings say so. Collective.

        state: plain numbers and names, with `step`. Waits for the save before. UserError when one of the two cannot be written.
        """
        self.finish()
        rank = self._world.rank
        contents = {f"shard-{rank}.safetensors": engine.snapshot() | self._generators()}
        weights = engine.weights()
        if self._world.is_main:
            contents["model.safetensors"] = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
            contents |= self._tokenizer
            contents["state.json"] = json.dumps(state, indent=2).encode()
        self._step, self._published = state["step"], False
        self._temporary = temporary_folder(self._run_folder, self._step, self._start)
        self._writing = self._thread.submit(write_files, self._temporary, rank, contents)
        if not self._settings.asynchronous:
            self.finish()

    def after_step(self) -> None:
        """See how far the save in flight is; every rank calls this once a step. No collective call, and no waiting.

        UserError when this rank's files could not be written.
        """
        if self._writing is None or self._published or not self._writing.done():
            return
        try:
            self._writing.result()
            files = written_files(self._temporary, self._world.size) if self._world.is_main else None
            if files is not None:
                self._publish(files)
        except OSError as error:
            raise self._refusal(_reason(error), everywhere=self._world.size == 1) from error

    def finish(self) -> None:
        """Wait until the save in flight, if there is one, is whole and can be seen. Collective. UserError on all ranks when one failed."""
        if self._writing is None:
            return
        try:
            outcome = self._writing.result()
        except OSError as error:
            outcome = _reason(error)
        outcomes = self._world.gather(outcome)
        reason = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
        if self._world.is_main and reason is None and not self._published:
            try:
                self._publish({name: entry for files in outcomes for name, entry in files.items()})
            except OSError as error:
                reason = _reason(error)
        reason = self._world.gather(reason)[0]
        if reason is not None:
            raise self._refusal(reason, everywhere=True)
        self._writing = None

    def _publish(self, files: dict[str, Entry]) -> None:
        """On rank 0: let the checkpoint be seen, and drop those that need not stay."""
        publish(self._temporary, checkpoint_folder(self._run_folder, self._step), files)
        self._published = True
        self._damaged.discard(self._step)
        steps = checkpoint_steps(self._run_folder)
        whole = [step for step in steps if step not in self._damaged]
        every = self._settings.keep_every
        stay = {*whole[-self._settings.keep :], *(step for step in whole if every and step % every == 0)}
        for step in set(steps) - stay:
            with suppress(OSError):  # the next save tries again
                remove(checkpoint_folder(self._run_folder, step))

    def _refusal(self, reason: str, everywhere: bool) -> UserError:
        whole = [step for step in checkpoint_steps(self._run_folder) if step not in self._damaged]
        kept = f"the last whole one is of step {whole[-1]}" if whole else "there is none before it"
        return UserError(
            f"the checkpoint of step {self._step} could not be written to {self._run_folder / 'checkpoints'} ({reason}), and {kept}: free "
            "some disk space there, or make the folder one that can be written, and start the same command again to continue", everywhere,
        )

    def _generators(self) -> dict[str, Tensor]:
        """This rank's torch generators, by names that no other rank uses."""
        states = {f"generator/{self._world.rank}/cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            states[f"generator/{self._world.rank}/cuda"] = torch.cuda.get_rng_state()
        return states

    def _restore_generators(self, tensors: dict) -> None:
        """Those of a rank that did not save stay as they were seeded."""
        for kind, setter in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
            name = f"generator/{self._world.rank}/{kind}"
            if name in tensors and kind in ("cpu", self._world.device.type):
                setter(tensors[name]())

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """An exception may be this rank's alone, so that nothing collective may follow it: what is in flight counts if all have written."""
        try:
            if kind is None:
                self.finish()
        finally:
            if self._writing is not None:
                with suppress(Exception):
                    self._writing.result()
                    self.after_step()
                if self._world.is_main and not self._published:
                    shutil.rmtree(self._temporary, ignore_errors=True)
            self._thread.shutdown()


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)


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


def refuse_damaged(folder: Path, names: list[str]) -> None:
    """UserError when files of a checkpoint are missing or not what was written."""
    damage = find_damage(folder, names)
    if damage is not None:
        raise UserError(f"checkpoint {folder} is damaged ({damage}): use another checkpoint")


def refuse_other_model(folder: Path, config: ModelConfig, tokenizer_hash: str) -> None:
    """UserError when the checkpoint in `folder` is of another model than `config`, or of another tokenizer.

    Whether documents are kept apart is no part of the weights: a model may be trained on with or without it.
    """
    state = read_state(folder)
    for name, ours in dataclasses.asdict(config).items():
        theirs = state["model"].get(name, getattr(ModelConfig, name, None))  # what an older checkpoint does not name was as by default
        if theirs != ours and name != "document_mark":
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
    refuse_damaged(folder, ["model.safetensors"])
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights in {folder} cannot be loaded ({first_line(error)}): use another checkpoint") from None
