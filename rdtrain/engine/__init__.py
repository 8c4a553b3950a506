"""Engines by name."""

import torch

from ..distributed import World, start_process_group
from ..model.recurrent import RecurrentDepthLM
from ..objectives import Objective
from ..optimization import OptimizerSettings
from .base import Engine, EngineSettings, TrainingModule
from .deepspeed_config import deepspeed_config
from .float8 import refuse_float8, use_float8

__all__ = ["Engine", "EngineSettings", "build_engine", "deepspeed_config", "refuse_float8", "start_processes"]


def start_processes(settings: EngineSettings, world: World) -> None:
    """Load the engine's library and join the process group; there is none for `torch`, which runs in one process."""
    if settings.name == "deepspeed":
        from .deepspeed_engine import initialise_distributed

        initialise_distributed(world)
    elif settings.name in ("fsdp", "block_parallel"):
        start_process_group(world)


def build_engine(settings: EngineSettings, model: RecurrentDepthLM, objective: Objective, optimizer: OptimizerSettings,
                 micro_batch: int, accumulation: int, world: World) -> Engine:
    """The engine that the settings name, around a model and its objective; after `start_processes`."""
    dtype, apart = settings.dtype(world.device), ()
    if settings.name == "block_parallel":
        from .block_parallel_engine import BlockParallelEngine, keep_own_block

        keep_own_block(model, world)  # before the model moves to the device, where the others need no room
    elif settings.name == "fsdp":
        from .fsdp_engine import FSDPEngine, sharded_layers

        apart = sharded_layers(model, objective)
    model = model.to(world.device)
    if settings.precision == "fp8":
        use_float8(model)
    if settings.compile:
        objective.compile(model, apart)
    if settings.cuda_graph:
        objective.capture()

    if settings.name == "block_parallel":
        return BlockParallelEngine(TrainingModule(model, objective, dtype), optimizer, accumulation, world)

    if settings.name == "fsdp":
        return FSDPEngine(TrainingModule(model, objective), optimizer, accumulation, world, dtype)

    if settings.name == "deepspeed":
        from .deepspeed_engine import DeepSpeedEngine

        config = deepspeed_config(settings, optimizer, micro_batch, accumulation, world.size, world.device)
        autocast = dtype if settings.zero_stage == 0 else torch.float32
        return DeepSpeedEngine(TrainingModule(model, objective, autocast), optimizer, config)

    from .torch_engine import TorchEngine

    return TorchEngine(TrainingModule(model, objective, dtype), optimizer, accumulation)
