"""The objectives by name. Objectives know the model; the model knows nothing of them."""

from ..model.noise import NoiseSettings
from .base import Loss, Metrics, Objective, ObjectiveSettings
from .bptt import BackpropagationThroughTime
from .diffusion_blocks import DiffusionBlocks

__all__ = ["Loss", "Metrics", "Objective", "ObjectiveSettings", "build_objective"]


def build_objective(settings: ObjectiveSettings, noise: NoiseSettings, iterations: int, blocks: int = 1) -> Objective:
    """The objective that the settings name; iterations and blocks are the model's K and B."""
    if settings.name == "diffusion_blocks":
        return DiffusionBlocks(noise, iterations, blocks)
    return BackpropagationThroughTime(settings.free_iterations, settings.trained_iterations, iterations)
