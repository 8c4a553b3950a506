"""ZeRO in two processes and gloo, once through the real `deepspeed` launcher, against one process of plain PyTorch written out here."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.data.loader import Loader, validation_windows
from rdtrain.data.shards import ShardReader
from rdtrain.distributed import World
from rdtrain.export import export
from rdtrain.metrics import read_metrics
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import build_objective
from rdtrain.randomness import SampleRandom
from rdtrain.scaling.processes import free_port
from rdtrain.train import train

OBJECTIVES = {
    "diffusion_blocks": {"name": "diffusion_blocks"},
    "bptt": {"name": "bptt", "trained_iterations": 2},
}


def plain_run(path: Path) -> tuple[list[float], list[float], float]:
    """The losses and gradient norms of a config's run, and its last held-out likelihood: whole global batches, torch's AdamW, its own
    clipping and schedule, no engine."""
    config = load_config(path)
    reader = ShardReader(Path(config.data.train))
    loader = Loader(reader, config.data.sequence_length, config.run.seed)
    objective = build_objective(config.objective, config.noise, config.model.iterations)
    torch.manual_seed(config.run.seed)
    shape = {name: getattr(config.model, name) for name in config.model.__dataclass_fields__}
    model = RecurrentDepthLM(ModelConfig(**shape, vocab_size=reader.vocab_size, **objective.model_fields))
    settings, steps, losses, norms = config.optimizer, config.schedule.steps, [], []
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1 and p is not model.embedding.weight],
             "weight_decay": settings.weight_decay},
            {"params": [model.embedding.weight], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
    )
    warmup = math.ceil(0.05 * steps)
    for step in range(steps):
        peak = settings.learning_rate
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = peak * (step + 1) / warmup if step < warmup else peak * (0.1 + 0.9 * cosine)
        optimizer.param_groups[1]["lr"] *= settings.embedding_scale
        samples = range(step * config.batch.global_sequences, (step + 1) * config.batch.global_sequences)
        loss = objective(model, loader.batch(samples), SampleRandom(config.run.seed, samples, torch.device("cpu"), step)).value
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping).item())
        optimizer.step()
        objective.after_step(step + 1, World.from_environment())
        losses.append(loss.item())
    held_out = validation_windows(ShardReader(Path(config.data.validation)), config.data.sequence_length, config.evaluation.sequences)
    with torch.no_grad():
        random = SampleRandom("validation", range(len(held_out)), torch.device("cpu"))
        nll = objective.held_out_nll(model, held_out, random).mean().item()
    return losses, norms, nll


def recorded(folder: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in read_metrics(folder / "metrics.jsonl") if record["step"]]


@pytest.mark.parametrize(
    ("objective", "engine", "clipping"),
    [
        ("diffusion_blocks", {"name": "deepspeed", "zero_stage": 1}, 0.3),
        ("bptt", {"name": "deepspeed", "zero_stage": 3}, 0.3),
        pytest.param("diffusion_blocks", {"name": "deepspeed", "zero_stage": 2}, 0.0, marks=pytest.mark.slow),
        ("bptt", {"name": "fsdp"}, 0.3),
    ],
)
def test_two_processes_give_the_losses_of_one_and_resume_bit_for_bit(tiny_config, tmp_path, deepspeed, ranks, objective, engine, clipping):
    """Global batch 8 on two ranks in micro-batches of 2: two processes and accumulation at once. The information curve, by which the
    denoiser's iterations are divided, is brought up to date at step 16, from what both ranks have seen. Of five held-out sequences one
    rank has three, and so a pass more to make."""
    steps = 18 if objective == "diffusion_blocks" else 8
    path = tiny_config(
        objective=OBJECTIVES[objective], noise={"partition": "equal_information"}, engine=engine,
        # An epsilon as large as small gradients: else Adam makes whole steps of those that rounding alone makes differ from zero.
        optimizer={"gradient_clipping": clipping or 1e9, "epsilon": 1e-4}, schedule={"steps": steps},
        checkpoint={"interval": steps // 2}, evaluation={"interval": steps // 2, "sequences": 5},
    )
    start = deepspeed if engine.get("zero_stage") == 1 else ranks  # once by the launcher, as a user would
    result = start("--config", path)
    assert result.returncode == 0, result.stderr
    first = recorded(tmp_path / "run")
    losses, norms, nll = plain_run(path)
    assert len(first) == steps
    assert first == pytest.approx(losses, abs=1e-5)
    assert recorded(tmp_path / "run", "gradient_norm") == pytest.approx(norms, rel=1e-3)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["validation_nll"] == pytest.approx(nll, rel=1e-5)
    for record in read_metrics(tmp_path / "run/metrics.jsonl")[1:]:
        assert math.hypot(*record["gradient_norm_by_part"].values()) == pytest.approx(record["gradient_norm"], rel=1e-4)
        if engine.get("zero_stage") in (1, 2):
            assert record["slowest_rank"] in (0, 1) and record["slowest_rank_excess"] >= 0
            assert 0 < record["rank_seconds"] < record["step_seconds"] + record["data_wait_seconds"]
        else:
            assert "slowest_rank" not in record
    export(tmp_path / "run", tmp_path / "model")

    shutil.rmtree(tmp_path / f"run/checkpoints/step-{steps:08d}")
    result = ranks("--config", path)
    assert result.returncode == 0 and f"continuing from step {steps // 2}" in result.stdout, result.stderr
    assert recorded(tmp_path / "run") == first


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bf16_trains_next_to_fp32(tiny_config, tmp_path, ranks, stage):
    """bf16 weights with fp32 master weights, four micro-batches a step: losses and gradient norms stay within bf16's rounding of the
    fp32 ones. The norms tell what clipping and Adam hide, a gradient that is added up wrongly."""
    path = tiny_config(
        engine={"name": "deepspeed", "precision": "bf16", "zero_stage": stage}, optimizer={"learning_rate": 1e-3, "gradient_clipping": 1e9}
    )
    result = ranks("--config", path, number=1)
    assert result.returncode == 0, result.stderr
    losses, norms, _ = plain_run(path)
    assert recorded(tmp_path / "run") == pytest.approx(losses, abs=0.02)
    assert recorded(tmp_path / "run", "gradient_norm") == pytest.approx(norms, rel=0.03)


@pytest.mark.slow
def test_an_interrupt_saves_a_checkpoint_and_the_next_start_continues(tiny_config, tmp_path):
    """Ctrl-C in a terminal: SIGINT to the launcher and all its processes. test_quickstart.py interrupts the same in every run."""
    path = tiny_config(engine={"name": "deepspeed"}, schedule={"steps": 400}, checkpoint={"interval": 400}, evaluation={"interval": 400})
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--"]
    command = [*launcher, "launch/train.py"]
    process = subprocess.Popen(
        [*command, "--config", str(path)], cwd=Path(__file__).parents[2], start_new_session=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not metrics.exists() or len(read_metrics(metrics)) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        while not (saved := list(tmp_path.glob("run/checkpoints/step-*/state.json"))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert 4 <= int(saved[0].parent.name.split("-")[1]) < 400
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_ranks_of_which_one_alone_is_told_estimates_train_as_one_process_does(tiny_config, tmp_path, ranks):
    """With micro-batches of one, all even samples are one rank's: only they go through an iteration before theirs."""
    settings = {
        "objective": {"self_conditioning": True, "chain_states": True, "core_readout": True}, "schedule": {"steps": 6},
        "batch": {"global_sequences": 4, "micro_sequences": 1}, "evaluation": {"interval": 6},
    }
    assert train(load_config(tiny_config("one", **settings))) == 0
    result = ranks("--config", tiny_config("two", **settings, engine={"name": "deepspeed", "zero_stage": 2}))
    assert result.returncode == 0, result.stderr
    for name in ("loss", "gradient_norm"):
        assert recorded(tmp_path / "two", name) == pytest.approx(recorded(tmp_path / "one", name), rel=1e-4)
