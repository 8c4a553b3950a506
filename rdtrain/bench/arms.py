"""The configs that are measured side by side: a config alone, the arms of a comparison, and the values of a sweep."""

import itertools
from dataclasses import dataclass, replace

from ..config import Config, override
from ..errors import UserError
from ..objectives import ObjectiveSettings

ARMS = {
    "blocks": {"name": "diffusion_blocks"},
    "one_pass": {"name": "one_pass"},
    "truncated": {"name": "bptt", "depth": "fixed"},
    "full": {"name": "bptt", "gradient": "full", "depth": "fixed"},
    "local": {"name": "bptt", "gradient": "local", "depth": "fixed"},
}
"""Objectives by name. Backpropagation through time runs model.iterations in every step: where the depth is drawn, a few steps say little
of the mean, whose 24 + 8 iterations of 32 these are."""


@dataclass
class Case:
    """One config to measure. arm: its name in tables; value: of the swept quantity, as it was typed, None without a sweep."""

    arm: str
    value: str | None
    config: Config


def cases(config: Config, arms: list[str], sweep: list[str]) -> list[Case]:
    """All that is measured, in order: for each value of a sweep each arm.

    arms: each a name of ARMS, which may be followed by overrides that are its own (`truncated objective.depth=poisson`); none for the
    config as it is, with its own objective. sweep: `section.key=value,value`, and more of these whose values go along with the first's.
    UserError for arms, keys and values that cannot be.
    """
    return [
        Case(arm or config.run.name, value, _configure(config, arm, overrides))
        for (value, overrides), arm in itertools.product(_points(sweep), arms or [None])
    ]


def _points(sweep: list[str]) -> list[tuple[str | None, list[str]]]:
    """The value of the first key, and the overrides of all keys, of each point."""
    if not sweep:
        return [(None, [])]
    columns, keys = [], [each.partition("=")[0] for each in sweep]
    if len(set(keys)) < len(keys):
        raise UserError(f"--sweep {' '.join(sweep)} has a key twice, and each has one value at a time: leave one of them out")
    for each in sweep:
        key, equals, values = each.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--sweep {each} is not of the form section.key=value,value, for example model.iterations=1,2,4,8")
        columns.append([f"{key}={value}" for value in values.split(",")])
    if len({len(column) for column in columns}) > 1:
        raise UserError(
            f"--sweep {' '.join(sweep)} gives its keys unequal numbers of values: give each as many, for example "
            "model.width=512,1024 model.heads=8,16"
        )
    return [(point[0].partition("=")[2], list(point)) for point in zip(*columns)]


def _configure(config: Config, arm: str | None, overrides: list[str]) -> Config:
    if arm is None:
        return override(config, overrides)
    name, *own = arm.split() or [""]
    if name not in ARMS:
        raise UserError(f"--compare knows no arm '{name}': choose from {', '.join(ARMS)}, and put overrides of all arms before options")
    twice = {each.partition("=")[0] for each in own} & {each.partition("=")[0] for each in overrides}
    if twice:
        raise UserError(f"--sweep has {' and '.join(sorted(twice))}, which is an override of the arm '{arm}' too: leave one of them out")
    if config.objective.name != "diffusion_blocks" or name != "blocks":  # the config's own blocks stay as they are
        config = replace(config, objective=ObjectiveSettings(**ARMS[name]))
    if name != "blocks":
        config = replace(config, model=replace(config.model, blocks=1))
    if config.objective.name == "bptt":
        config = replace(config, engine=replace(config.engine, cuda_graph=False))
    config = override(config, [*own, *overrides])
    if name == "one_pass":
        config = replace(config, model=replace(config.model, iterations=1))
    objective = config.objective
    if name == "truncated" and objective.depth == "fixed" and objective.trained_iterations > config.model.iterations:
        config = replace(config, objective=replace(objective, trained_iterations=config.model.iterations))  # Huginn's min(8, K)
    return config
