"""What is measured: layouts of a model on 1, 2, 4 and 8 GPUs, with one micro-batch for all, and which of them do not fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bench.arms import cases
from ..config import Config, load_config, override
from ..distributed import World
from ..errors import UserError
from ..estimate import Shares, model_on_paper, rank_memory
from ..hardware import Gpu
from ..plan.costing import CUDA, with_batch
from ..preparation import objective_and_model

RESERVE = 4.0
"""GiB of a GPU that tensors cannot have: `rdtrain plan`'s default."""

LAYOUTS = {
    "ZeRO-1": "engine.name=deepspeed engine.zero_stage=1",
    "ZeRO-2": "engine.name=deepspeed engine.zero_stage=2",
    "ZeRO-3": "engine.name=deepspeed engine.zero_stage=3",
    "FSDP2": "engine.name=fsdp",
    "block-parallel": "engine.name=block_parallel",
    "plain": "engine.name=torch",
}

WANTED = (
    ("blocks", "ZeRO-1", False), ("blocks", "FSDP2", False), ("blocks", "block-parallel", True), ("blocks", "plain", False),
    ("blocks", "ZeRO-1", True), ("blocks", "FSDP2", True), ("blocks", "ZeRO-2", False), ("truncated", "ZeRO-1", False),
    ("truncated", "FSDP2", False), ("truncated", "ZeRO-2", False), ("blocks", "ZeRO-3", False), ("truncated", "ZeRO-3", False),
)
"""Objective (an arm of `rdtrain bench`), layout, and whether blocks are untied, the most important first: a cut loses the last. ZeRO-3 is
last of all, as it leaves memory in use (`left_over` of a measurement)."""


@dataclass(frozen=True)
class Model:
    """A model to measure. name: in tables; config: a YAML file; vocab_size: tokens of its vocabulary."""

    name: str
    config: Path
    vocab_size: int

    @classmethod
    def parse(cls, text: str) -> "Model":
        """Of NAME=CONFIG:VOCABULARY, for example 857M=configs/1b.yaml:32768. UserError for anything else."""
        name, equals, rest = text.partition("=")
        config, colon, size = rest.rpartition(":")
        if not (equals and colon and name and config and size.isdecimal()):
            raise UserError(f"--models {text} is not NAME=CONFIG:VOCABULARY, for example 857M=configs/1b.yaml:32768")
        return cls(name, Path(config), int(size))


@dataclass(frozen=True)
class Job:
    """One measurement.

    objective: `blocks` or `truncated`; layout: of LAYOUTS; blocks: untied cores, 1 for a tied model; gpus: how many; micro: sequences of a
    GPU, which are one micro-batch, so that the global batch grows with the GPUs. arm: for `rdtrain bench --compare`; config: what that
    makes of the model's config. peak: bytes of a GPU by the estimate, on CUDA.
    """

    model: Model
    objective: str
    layout: str
    blocks: int
    gpus: int
    micro: int
    arm: str
    config: Config
    peak: int

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.objective}, {self.blocks} untied" if self.blocks > 1 else self.objective


def base_config(model: Model, settings: Sequence[str]) -> Config:
    """The model's config, nothing compiled but where a job says so."""
    return load_config(model.config, [*settings, "engine.compile=false"])


def compiles(config: Config, layout: str, blocks: int) -> bool:
    """Whether a layout's engine can be compiled in this version; plain PyTorch, the measure of block-parallel training, only where that
    can be too."""
    if layout == "plain" and not compiles(config, "block-parallel", 2):
        return False
    try:
        override(config, [*LAYOUTS[layout].split(), f"model.blocks={blocks}", "engine.compile=true"])
    except UserError:
        return False
    return True


def peak(config: Config, vocab_size: int, gpus: int) -> int:
    """Bytes that a rank has allocated at most, on so many GPUs, by rdtrain/estimate.py."""
    world = World(0, gpus, 0, CUDA)
    objective, model = objective_and_model(config, world, vocab_size, bos_id=0)
    shares = Shares.of(model_on_paper(model), config, objective, gpus)
    memory = rank_memory(shares, model, config, objective, world, config.schedule.steps or 1)
    return memory.peak(config.batch.accumulation(gpus))


def room_of(gpu: Gpu) -> float:
    """Bytes of a GPU for tensors."""
    return 2**30 * (gpu.memory - RESERVE)


def places(counts: Sequence[int]) -> Iterable[tuple[str, str, int, int]]:
    """Objective, layout, blocks and GPUs of all that is measured on these numbers of GPUs, in order of importance on each.

    Block-parallel training has a block for each GPU, and beside it the same untied model under ZeRO-1 and FSDP2, on one GPU too. Plain
    PyTorch runs on one GPU alone, where it is what block-parallel training is on each: one block's share.
    """
    several = [count for count in counts if count > 1]
    for gpus in counts:
        for objective, layout, untied in WANTED:
            if layout == "plain" and gpus == 1 or layout not in ("plain", "block-parallel") and not untied:
                yield objective, layout, 1, gpus
            elif untied and gpus > 1:
                yield objective, layout, gpus, gpus
            elif untied and layout != "block-parallel":
                for blocks in several:
                    yield objective, layout, blocks, 1


def order_of(counts: Iterable[int]) -> list[int]:
    """Numbers of GPUs in order of importance: 1, 2, the most, and what lies between."""
    counts = sorted(set(counts))
    first = [count for count in (1, 2, counts[-1]) if count in counts]
    return list(dict.fromkeys([*first, *counts]))


def jobs_of(model: Model, counts: Sequence[int], settings: Sequence[str], gpu: Gpu | None, compiled: bool) -> list[Job]:
    """All measurements of a model, in the order in which they are made.

    The micro-batch of an objective is the largest, halved from the config's own, with which no layout fails to fit that fits with a single
    sequence. gpu: what there is; None on the CPU, where everything is tried. compiled: whether to compile what can be.
    """
    base = base_config(model, settings)
    found = []
    wanted = list(places(counts))
    for objective in dict.fromkeys(place[0] for place in wanted):
        sizes = [base.batch.micro_sequences]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        rows = [place for place in wanted if place[0] == objective]
        made = {micro: [_job(model, base, place, micro, compiled) for place in rows] for micro in sizes}
        chosen = sizes[-1]
        if gpu is not None:
            room = room_of(gpu)
            fitting = [index for index, job in enumerate(made[sizes[-1]]) if job.peak <= room]
            chosen = next(micro for micro in sizes if micro == sizes[-1] or all(made[micro][index].peak <= room for index in fitting))
        else:
            chosen = sizes[0]
        found += made[chosen]
    position = {(place[1:], place[0]): number for number, place in enumerate(wanted)}
    return sorted(found, key=lambda job: position[(job.layout, job.blocks, job.gpus), job.objective])


def _job(model: Model, base: Config, place: tuple[str, str, int, int], micro: int, compiled: bool) -> Job:
    objective, layout, blocks, gpus = place
    words = [objective, LAYOUTS[layout], f"batch.micro_sequences={micro}", f"batch.global_sequences={micro * gpus}"]
    words += [f"model.blocks={blocks}"] * (blocks > 1)
    words += ["engine.compile=true"] * (compiled and compiles(base, layout, blocks))
    arm = " ".join(words)
    config = cases(with_batch(base, micro * gpus, micro), [arm], [])[0].config
    return Job(model, objective, layout, blocks, gpus, micro, arm, config, peak(config, model.vocab_size, gpus))
