"""engine.compile=true, with the real compiler: the same run, and a warm-up that leaves no trace."""

import json
import os
import shutil

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.metrics import read_metrics
from rdtrain.model.information import UNIT
from rdtrain.train import train

SMALL = {"width": 16, "heads": 2, "mlp_width": 16, "core_layers": 1, "iterations": 4}
STEPS = 3


@pytest.fixture
def compiler():
    """torch.compile, with nothing left of other compilations."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler on CPU, and there is none here")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "diffusion_blocks", "self_conditioning": True, "chain_states": True, "core_readout": True},
        {"name": "bptt", "trained_iterations": 2},
        {"name": "one_pass"},
    ],
    ids=lambda objective: objective["name"],
)
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_its_warm_up_leaves_no_trace(compiler, objective, tiny_config, tmp_path):
    model = SMALL | ({"iterations": 1} if objective["name"] == "one_pass" else {})
    states, records = {}, {}
    for compiled in (False, True):
        name = f"compiled-{compiled}"
        config = tiny_config(
            name, objective=objective, model=model, engine={"name": "torch", "compile": compiled}, schedule={"steps": STEPS},
            batch={"global_sequences": 4, "micro_sequences": 4}, evaluation={"interval": STEPS, "sequences": 4},
        )
        assert train(load_config(config)) == 0
        states[compiled] = json.loads((tmp_path / name / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["objective_state"]
        records[compiled] = read_metrics(tmp_path / name / "metrics.jsonl")
    for plain, compiled in zip(records[False], records[True], strict=True):
        for key in {"loss", "gradient_norm", "validation_nll"} & plain.keys():
            assert compiled[key] == pytest.approx(plain[key], rel=1e-4), f"{key} at step {plain['step']}"
    if objective["name"] == "diffusion_blocks":
        assert sum(states[True]["pending"][1]) * UNIT == STEPS * 4 * 16
        assert states[True]["pending"][1] == states[False]["pending"][1]
        assert states[True]["information_curve"] == states[False]["information_curve"]


def test_compile_is_refused_for_zero_3(tiny_config, rdtrain, refused, tmp_path):
    result = rdtrain("train", "--config", tiny_config(engine={"name": "deepspeed", "zero_stage": 3}), "engine.compile=true")
    refused(result, "compile cannot go with zero_stage=3", "use zero_stage 0 to 2, or name=fsdp, or leave compile off")
    assert not (tmp_path / "run").exists()


def test_a_machine_without_a_compiler_is_refused_in_one_sentence(tiny_config, rdtrain, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    result = rdtrain("train", "--config", tiny_config(model=SMALL), "engine.compile=true")
    refused(result, "torch.compile failed", "install a C++ compiler, or set engine.compile=false")
