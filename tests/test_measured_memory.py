"""rdtrain/estimate.py against what `rdtrain bench` measured in bf16 on one and two NVIDIA H200; torch 2.11.0, deepspeed 0.19.8, 2026-11-28.

configs/1b.yaml, 850M parameters with a vocabulary of 32,768, micro-batches of 8 x 2,048 tokens, at commit 7ac4a84, and in fp8 at 2205f7d;
and configs/3.5b.yaml with 65,536 and 1 x 4,096, where messages and gradients outweigh activations, at d9edc4f, BPTT under plain PyTorch at
2205f7d, and on two at dfb3cc2, a day later."""

from pathlib import Path

import pytest
import torch

from rdtrain.bench.arms import cases
from rdtrain.config import load_config, override
from rdtrain.distributed import World
from rdtrain.estimate import Shares, model_on_paper, rank_memory
from rdtrain.preparation import objective_and_model

CONFIGS = Path(__file__).parent.parent / "configs"
VOCABULARY = {"1b": 32_768, "3.5b": 65_536}
ENGINES = {
    "plain": "engine.name=torch",
    "fp8": "engine.name=torch engine.precision=fp8",
    "fsdp": "engine.name=fsdp",
    "block-parallel": "engine.name=block_parallel",
    **{f"zero-{stage}": f"engine.name=deepspeed engine.zero_stage={stage}" for stage in (1, 2, 3)},
}
MEASURED = [
    # objective, engine, GPUs, blocks; GiB: activations, passes, peak. All but ZeRO-3 are compiled. None: 22.33 GiB of activations were
    # measured where the estimate has 20.93; it has no term for what stage 3 may still have gathered then.
    ("blocks", "plain", 1, 1, 15.72, 17.36, 26.88),
    ("blocks", "zero-1", 1, 1, 14.05, 15.69, 29.99),
    ("blocks", "zero-1", 2, 1, 14.05, 15.69, 25.25),
    ("blocks", "zero-2", 1, 1, 14.05, 15.69, 26.77),
    ("blocks", "zero-2", 2, 1, 14.05, 15.69, 22.02),
    ("blocks", "zero-3", 1, 1, 20.94, 22.73, 37.91),
    ("blocks", "zero-3", 2, 1, None, 24.12, 32.47),
    ("blocks", "fsdp", 1, 1, 14.51, 16.31, 26.09),
    ("blocks", "fsdp", 2, 1, 14.51, 16.31, 21.43),
    ("blocks", "zero-1", 1, 2, 14.05, 15.69, 36.48),
    ("blocks", "zero-1", 2, 2, 14.04, 15.69, 29.55),
    ("blocks", "fsdp", 1, 2, 14.51, 16.31, 30.42),
    ("blocks", "fsdp", 2, 2, 14.49, 16.28, 23.65),
    ("blocks", "block-parallel", 2, 2, 15.72, 17.36, 30.09),
    ("blocks", "fp8", 1, 1, 10.22, 11.86, 21.38),
    ("blocks objective.layer_checkpointing=selective", "fp8", 1, 1, 9.34, 11.06, 20.58),
    ("blocks objective.layer_checkpointing=full objective.layer_checkpointing_interval=4", "fp8", 1, 1, 8.09, 9.73, 19.32),
    ("truncated", "zero-1", 1, 1, 61.94, 62.55, 76.66),
    ("truncated", "zero-1", 2, 1, 61.95, 62.55, 71.96),
    ("truncated", "zero-2", 1, 1, 61.94, 62.55, 73.52),
    ("truncated", "zero-2", 2, 1, 61.94, 62.55, 68.82),
    ("truncated", "zero-3", 1, 1, 87.91, 88.90, 103.94),
    ("truncated", "zero-3", 2, 1, 89.29, 90.28, 98.56),
    ("truncated", "fsdp", 1, 1, 62.26, 62.92, 73.24),
    ("truncated", "fsdp", 2, 1, 61.56, 62.22, 68.70),
]
LARGE = [
    # objective, engine, GPUs, blocks; GiB: activations, peak. What passes take is messages here, for the most part. None: the estimate
    # counts the inside of an iteration that is computed again, which is not there yet when the measurement looks; of stage 3 as above; of
    # truncated BPTT under FSDP2 on two GPUs 29.91 GiB of activations were measured where the estimate has 32.64, and why is not known.
    ("blocks", "plain", 1, 1, 14.60, 56.52),
    ("blocks", "zero-1", 1, 1, 7.85, 86.78),
    ("blocks", "zero-2", 1, 1, 7.85, 68.89),
    ("blocks", "zero-3", 1, 1, 11.36, 74.58),
    ("blocks", "fsdp", 1, 1, 8.06, 56.94),
    ("blocks", "zero-1", 1, 2, 7.85, 105.14),
    ("blocks", "fsdp", 1, 2, 8.06, 75.41),
    ("truncated", "plain", 1, 1, 39.37, 81.22),
    ("truncated objective.activation_checkpointing=true", "plain", 1, 1, None, 60.87),
    ("full objective.activation_checkpointing=true", "plain", 1, 1, None, 61.86),
    ("truncated", "zero-1", 1, 1, 32.70, 93.98),
    ("truncated", "zero-2", 1, 1, 32.70, 93.46),
    ("truncated", "fsdp", 1, 1, 32.85, 79.60),
    ("blocks", "zero-1", 2, 1, 7.85, 66.77),
    ("blocks", "zero-2", 2, 1, 7.85, 42.85),
    ("blocks", "zero-3", 2, 1, None, 46.48),
    ("blocks", "fsdp", 2, 1, 8.09, 32.08),
    ("blocks", "block-parallel", 2, 2, 14.60, 69.87),
    ("blocks", "zero-1", 2, 2, 7.85, 75.92),
    ("blocks", "fsdp", 2, 2, 7.98, 41.40),
    ("truncated", "zero-1", 2, 1, 32.70, 74.05),
    ("truncated", "zero-2", 2, 1, 32.70, 67.55),
    ("truncated", "zero-3", 2, 1, None, 82.86),
    ("truncated", "fsdp", 2, 1, None, 59.69),
]
ROWS = [("1b", *row) for row in MEASURED]
ROWS += [("3.5b", objective, engine, gpus, blocks, activations, None, peak) for objective, engine, gpus, blocks, activations, peak in LARGE]


@pytest.mark.parametrize(("name", "objective", "engine", "gpus", "blocks", "activations", "passes", "peak"), ROWS)
def test_the_estimate_is_what_was_measured(name, objective, engine, gpus, blocks, activations, passes, peak):
    """To 4 %: the largest deviation is 3.7 %. The measurement counts copies of weights that autocast makes among the activations."""
    base = load_config(CONFIGS / f"{name}.yaml")
    settings = [*ENGINES[engine].split(), f"engine.compile={str(engine != 'zero-3').lower()}"]
    settings.append(f"batch.global_sequences={base.batch.micro_sequences * gpus}")
    arm = objective if blocks == 1 else f"{objective} model.blocks={blocks}"
    config, world = cases(override(base, settings), [arm], [])[0].config, World(0, gpus, 0, torch.device("cuda"))
    trained, model = objective_and_model(config, world, VOCABULARY[name], bos_id=0)
    shares = Shares.of(model_on_paper(model), config, trained, gpus)
    memory = rank_memory(shares, model, config, trained, world, steps=1)
    casts = memory.gathered if engine in ("plain", "fp8", "block-parallel") else 0
    for found, told in ((activations, memory.activations + casts), (passes, memory.passes), (peak, memory.peak(accumulation=1))):
        if found is not None:
            assert told / 2**30 == pytest.approx(found, rel=0.04)
