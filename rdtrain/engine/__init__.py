"""Engines by name."""

from ..distributed import World
from ..errors import UserError
from ..model.recurrent import RecurrentDepthLM
from ..objectives import Objective
from ..optimization import OptimizerSettings
from .base import Engine, EngineSettings

__all__ = ["Engine", "EngineSettings", "build_engine", "start_processes"]


def start_processes(settings: EngineSettings, world: World) -> None:
    """Load the engine's library and join the process group. UserError when `torch` is asked to run several ranks."""
    if settings.name == "deepspeed":
        from .deepspeed_engine import initialise_distributed

        initialise_distributed(world)
    elif world.size > 1:
        raise UserError(f"engine.name=torch runs in one process, and there are {world.size}: use engine.name=deepspeed")


def build_engine(settings: EngineSettings, model: RecurrentDepthLM, objective: Objective, optimizer: OptimizerSettings,
                 micro_batch: int, accumulation: int, world: World) -> Engine:
    """The engine that the settings name, around a model and its objective; after `start_processes`."""
    dtype = settings.dtype(world.device)
    if settings.name == "deepspeed":
        from .deepspeed_engine import DeepSpeedEngine, deepspeed_config

        config = deepspeed_config(optimizer, settings.zero_stage, micro_batch, accumulation, world.size, dtype)
        return DeepSpeedEngine(model, objective, optimizer, config, world)

    from .torch_engine import TorchEngine

    return TorchEngine(model, objective, optimizer, accumulation, world.device, dtype, settings.compile)
