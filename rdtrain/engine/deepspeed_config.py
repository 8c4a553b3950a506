"""The DeepSpeed config of a run, made from its settings: `rdtrain train --print-deepspeed-config` prints it.

Every value is written that DeepSpeed would otherwise choose and that bears on the result, the memory or the traffic, so that a new
version's defaults change nothing (`gradient_clipping`, for one, became 1.0 in 0.19). configs/deepspeed/ shows one for each stage and
explains every value. None of them is there to be edited: the batch and the number of ranks, the precision and the clipping are the run's
own, and a second place for them could only contradict it.
"""

import sys

import torch

from ..optimization import OptimizerSettings
from .base import EngineSettings

BUCKET = 500_000_000
"""Elements that are reduced or gathered in one message."""

LIVE = 1_000_000_000
"""Stage 3 keeps so many gathered elements from a forward to its backward pass."""

PERSISTENT = 100_000
"""Stage 3 leaves weights of at most so many elements whole: norms, which are hardly worth a message."""


def deepspeed_config(engine: EngineSettings, optimizer: OptimizerSettings, micro_batch: int, accumulation: int, world_size: int,
                     device: torch.device) -> dict:
    """The config for `deepspeed.initialize`."""
    stage = engine.zero_stage
    # Stage 0 in bf16 is torch.autocast around fp32 weights: DeepSpeed's own bf16 optimizer for it makes an AdamW step of zeros when it is
    # built, and adds micro-batches up in bf16.
    bf16 = engine.dtype(device) == torch.bfloat16 and stage > 0
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET,
        "use_multi_rank_bucket_allreduce": True,
        "round_robin_gradients": False,
        "overlap_comm": stage >= 2,
        "load_from_fp32_weights": True,
        "ignore_unused_parameters": True,  # idle blocks
        "elastic_checkpoint": False,
        "legacy_stage1": False,
    }
    if stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_model_persistence_threshold": sys.maxsize,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_gather_16bit_weights_on_model_save": False,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_module_granularity_threshold": 0,
            "stage3_allgather_sequential": False,
            "memory_efficient_linear": True,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
        }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda", "ratio": 1.0}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "zero_allow_untested_optimizer": True,  # BlockAdamW, which tests/distributed/test_blocks.py tests
        "zero_force_ds_cpu_optimizer": False,  # it makes the step on the CPU as well, and there is nothing to compile
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {
            "enabled": bf16, "immediate_grad_update": False, "check_grad_overflow": True, "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},  # stage 0's is around the module, inside of the engine
        # Micro-batches are added up in fp32 whatever the weights' dtype, and ranks in the dtype of the weights.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "bf16" if bf16 else "fp32",
        "zero_optimization": zero,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "disable_allgather": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
