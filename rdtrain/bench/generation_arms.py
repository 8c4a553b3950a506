"""Who generates, where the cost of generation is compared: denoising blocks, an unrolled model, a plain transformer; and their weights."""

import functools
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from ..config import load_config
from ..distributed import World
from ..errors import UserError
from ..estimate import model_on_paper
from ..flops import forward_flops, generation_flops
from ..model.compiled import compiled_part
from ..model.generation import TextGenerator
from ..model.information import InformationCurve
from ..model.layers import SandwichBlock
from ..model.noise import NoiseSchedule
from ..model.recurrent import ModelConfig, ModelSettings, RecurrentDepthLM
from ..model.sampling import Sampling
from ..preparation import objective_and_model

KINDS = ("blocks", "bptt", "plain")
EXAMPLE = "configs/1b.yaml:32768"


@dataclass
class Arm:
    """Who generates, and how. kind: one of KINDS; graph: whether steps are captured, on CUDA and where they can be; compile: whether they
    are compiled, of a plain transformer layer by layer."""

    name: str
    kind: str
    sampling: Sampling
    graph: bool = True
    compile: bool = False

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """`KIND setting=value ...`, the settings being those of `Sampling`, `graph` and `compile`. UserError for what cannot be."""
        kind, *settings = text.split() or [text]
        kinds = {one.name: one.type for one in fields(Sampling)}
        given, steps = {}, {}
        try:
            for setting in settings:
                name, _, value = setting.partition("=")
                if name in ("graph", "compile") and value in ("true", "false"):
                    steps[name] = value == "true"
                else:
                    given[name] = value if kinds[name] is str else int(value) if kinds[name] is int else float(value)
            sampling = Sampling(**given)
        except (KeyError, ValueError) as error:
            raise UserError(f"arm '{text}' cannot be ({error}): write KIND setting=value, with settings of generation") from None
        if kind not in KINDS:
            raise UserError(f"there is no arm '{kind}': choose from {', '.join(KINDS)}")
        if kind != "blocks" and sampling.changes_the_chain:
            raise UserError(f"arm '{text}' has settings of a denoising chain: leave solver and chain_* to blocks")
        return cls(text, kind, sampling, **steps)


@dataclass
class Subject:
    """A model that is measured. name: as tables have it; model: where it is trained already, and loaded."""

    name: str
    shape: ModelConfig
    noise: NoiseSchedule
    dtype: torch.dtype
    model: RecurrentDepthLM | None = None

    @classmethod
    def load(cls, text: str, device: torch.device) -> "Subject":
        """An exported folder of a denoising model, or `CONFIG:TOKENS`. UserError for what is neither."""
        if Path(text).is_dir():
            try:
                loaded = TextGenerator.load(Path(text), str(device))
            except ValueError as error:
                raise UserError(str(error)) from None
            if not loaded.model.config.noise_conditioning:
                raise UserError(f"{text} is not of denoising blocks, which all else is compared with: give one that is")
            return cls(Path(text).name, loaded.model.config, loaded.noise, loaded.model.embedding.weight.dtype, loaded.model)
        path, _, tokens = text.rpartition(":")
        if not path or not tokens.isdigit() or int(tokens) < 1:
            raise UserError(f"{text} is no exported folder: give one, or a config and the tokens of its vocabulary, as {EXAMPLE}")
        config = load_config(Path(path), ["objective.name=diffusion_blocks"])
        shape = objective_and_model(config, World(0, 1, 0, device), int(tokens), 0)[1]
        curve = InformationCurve.expected(config.noise.sigma_min, config.noise.sigma_max)
        return cls(Path(path).stem, shape, NoiseSchedule(config.noise, curve), config.engine.dtype(device))


def shape_of(kind: str, blocks: ModelConfig, iterations: int, length: int) -> ModelConfig:
    """The model of an arm: the blocks' own, or an unrolled one of the same shape, or a plain transformer of as many operations.

    The last has all layers but two in its prelude, and runs its core once; length: positions that a token attends to.
    """
    if kind == "blocks":
        return blocks
    same = {one.name: getattr(blocks, one.name) for one in fields(ModelSettings)} | {"blocks": 1}
    unrolled = ModelConfig(**same, vocab_size=blocks.vocab_size, unused_tokens=blocks.unused_tokens)
    if kind == "bptt":
        return unrolled
    plain = replace(unrolled, prelude_layers=1, core_layers=1, coda_layers=1, iterations=1, initial_state="zero")
    missing = generation_flops(blocks, iterations, length) - generation_flops(plain, 1, length)
    return replace(plain, prelude_layers=1 + max(0, round(missing / forward_flops(plain, length).layer)))


def compile_layers(model: RecurrentDepthLM) -> None:
    """Each layer compiled by itself, with code for all: the hundreds that only a plain transformer has would take minutes as one."""
    for layer in model.modules():
        if isinstance(layer, SandwichBlock):
            layer.forward = functools.partial(compiled_part(SandwichBlock.forward), layer)


def build(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> RecurrentDepthLM:
    """A model with random weights, made where it runs and as it runs: in fp32 first, a deep one would not fit."""
    model = model_on_paper(shape).to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=shape.width**-0.5 / 2)
        else:
            parameter.fill_(1)
    if shape.noise_conditioning:  # as before training: a state that the noise level neither scales nor shifts
        for name, parameter in model.named_parameters():
            if ".modulation." in name:
                parameter.zero_()
    return model
