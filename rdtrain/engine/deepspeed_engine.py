"""DeepSpeed ZeRO behind the engine interface.

Every value that DeepSpeed would default and that changes the mathematics is written into its config: `gradient_clipping`, for
one, defaults to 1.0 since 0.19. The optimizer is torch's AdamW but for the blocks that it leaves out, so nothing is compiled
at start.
"""

import datetime
import os
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch

from ..distributed import World
from ..model.recurrent import RecurrentDepthLM
from ..objectives import Loss, Objective
from ..optimization import OptimizerSettings, build_optimizer
from .base import Engine, MicroBatch, TrainingModule

TAG = "deepspeed"


def initialise_distributed(world: World, timeout_minutes: float = 30) -> None:
    """Start the process group: NCCL on CUDA, gloo on CPU. The default time limit is generous for a slow save or a first compile."""
    if "MASTER_ADDR" not in os.environ:  # started without a launcher
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory operator here that training never calls; a build killed half-way leaves a lock
        # on which every later run hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch 2.13 is about to drop; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # we test ours
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=datetime.timedelta(minutes=timeout_minutes), verbose=False)


def deepspeed_config(optimizer: OptimizerSettings, zero_stage: int, micro_batch: int, accumulation: int, world_size: int,
                     dtype: torch.dtype) -> dict:
    """The DeepSpeed config of a run, with every value written that matters to its result."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "zero_allow_untested_optimizer": True,  # BlockAdamW, which tests/distributed/test_blocks.py tests
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        # Micro-batches are added up in fp32 whatever the weights' dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": zero_stage == 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        "prescale_gradients": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine(Engine):
    """ZeRO 1 or 2 over the default process group."""

    def __init__(self, model: RecurrentDepthLM, objective: Objective, optimizer: OptimizerSettings, config: dict, world: World):
        """config: of `deepspeed_config`. The process group must stand."""
        self.facts = {"deepspeed_config": config}
        self.model = model.to(world.device)
        self._optimizer = build_optimizer(self.model, optimizer)  # ZeRO puts its flat shards into the groups of this very object
        self._engine, _, _, _ = deepspeed.initialize(
            model=TrainingModule(self.model, objective), optimizer=self._optimizer, config=config
        )

    def train_step(self, micro_batches: Iterable[MicroBatch], learning_rate: float, block: int | None = None) -> list[Loss]:
        self._optimizer.active_block = block
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for tokens, random in micro_batches:
            loss = Loss(*self._engine(tokens, random))
            self._engine.backward(loss.value)
            self._engine.step()  # DeepSpeed counts micro-batches itself and updates at the last
            losses.append(loss)
        return losses

    def gradient_norm(self) -> float:
        return float(self._engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag=TAG)
