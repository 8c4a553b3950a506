"""What config.json says of an exported model, checked: every value is one that this code can run, or the folder is refused."""

import json
import math
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch

from .noise import NoiseSchedule, NoiseSettings
from .recurrent import ModelConfig
from .tokenizer import TOKENIZER_FILES

FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16", "float64")


def checked_model(values: Any) -> ModelConfig:
    """The model of a `model` section. ValueError, in one sentence, for anything that makes none."""
    return ModelConfig(**_checked(ModelConfig, values, "model"))


def checked_noise(values: Any, curve: Any, model: ModelConfig) -> NoiseSchedule:
    """The noise levels of a `noise` section and an `information_curve`, which a model that is not a denoiser may lack.

    ValueError, in one sentence, for values that give none.
    """
    if model.noise_conditioning and not values:
        raise ValueError("it has no noise levels")
    if curve is not None and not (isinstance(curve, list) and all(type(one) in (int, float) and math.isfinite(one) for one in curve)):
        raise ValueError("information_curve must be a list of finite numbers")
    if curve and any(later < before - 1e-6 for before, later in zip(curve, curve[1:])):  # its levels would jump up and down
        raise ValueError("information_curve must not fall from one number to the next")
    schedule = NoiseSchedule.from_plain(_checked(NoiseSettings, values or {}, "noise"), curve)
    if model.noise_conditioning:
        schedule.levels(model.iterations)
    return schedule


def checked_dtype(name: Any) -> torch.dtype:
    """The dtype of weights. ValueError for a name that is none of DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, and it is {name!r}")
    return getattr(torch, name)


def check_format(number: Any) -> None:
    """ValueError for a folder that another version of this code has written."""
    if type(number) is not int or number != FORMAT:
        raise ValueError(f"its format is {number!r}, and this code reads {FORMAT}")


def check_files_beside(folder: Path) -> None:
    """ValueError where a file that transformers goes on without is missing or not whole.

    Without generation_config.json no text would end, and without tokenizer_config.json, where there is a tokenizer, none would begin with
    its mark.
    """
    tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    for file in (folder / "generation_config.json", *[folder / "tokenizer_config.json"] * tokenizer):
        try:
            whole = isinstance(json.loads(file.read_text()), dict)
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"{file} is missing or not whole: export the model again")


def _checked(kind: type, values: Any, section: str) -> dict:
    """Values by name, of the types that a dataclass gives its fields; whole numbers may stand for others."""
    if not isinstance(values, dict):
        raise ValueError(f"{section} must be settings by name, and it is {values!r}")
    types = {one.name: one.type for one in fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"unknown setting {name} of the {section}")
        if not fits(value, types[name]):
            raise ValueError(f"{section}.{name} cannot be {value!r}")
    return values


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as dataclasses write it; a whole number may stand for another one."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) in (int, float):
        return abs(value) < 1e300 and math.isfinite(value)
    if type(value) is int and int in kinds:
        return abs(value) < 2**31  # beyond which no tensor has room, and torch says so in other words at each place
    return type(value) in kinds and type(value) is not float or value is None and NoneType in kinds
