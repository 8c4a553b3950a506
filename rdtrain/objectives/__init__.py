"""The objectives by name. Objectives know the model; the model knows nothing of them."""

from ..model.noise import NoiseSettings
from .base import Loss, Metrics, Objective, ObjectiveSettings
from .bptt import BackpropagationThroughTime
from .diffusion_blocks import DiffusionBlocks
from .one_pass import OnePass

__all__ = ["Loss", "Metrics", "Objective", "ObjectiveSettings", "build_objective"]


def build_objective(settings: ObjectiveSettings, noise: NoiseSettings, iterations: int, blocks: int = 1) -> Objective:
    """The objective that the settings name; iterations and blocks are the model's K and B.

    UserError for a K that the objective cannot have.
    """
    if settings.name == "diffusion_blocks":
        objective = DiffusionBlocks(noise, iterations, settings, blocks)
    elif settings.name == "one_pass":
        objective = OnePass(iterations)
    else:
        objective = BackpropagationThroughTime(settings, iterations)
    objective.layer_checkpointing = settings.layer_checkpointing
    objective.layer_checkpointing_interval = settings.layer_checkpointing_interval
    return objective
