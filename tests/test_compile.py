"""engine.compile=true: the same run, and a warm-up that leaves no trace; and what compiled code saves.

By the real compiler in a slow test, whose kernels take two minutes of C++ for each objective. In every run they are traced and divided into
passes as for it, and no more; the gated MLP alone is compiled to the end.
"""

import functools
import json
import os
import shutil

import pytest
import torch

from rdtrain.activations import Passes, activation_bytes
from rdtrain.config import load_config
from rdtrain.metrics import read_metrics
from rdtrain.model.information import UNIT
from rdtrain.model.layers import GatedMLP, SandwichBlock
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.randomness import SampleRandom
from rdtrain.train import train

SMALL = {"width": 16, "heads": 2, "mlp_width": 16, "core_layers": 1, "iterations": 4}
STEPS = 3


@pytest.fixture
def compile_by(monkeypatch):
    """Has torch.compile use a backend, with nothing left of other compilations."""

    def choose(backend):
        if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
            pytest.skip("torch.compile needs a C++ compiler on CPU, and there is none here")
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        torch._dynamo.reset()

    yield choose
    torch._dynamo.reset()


BLOCKS = {"name": "diffusion_blocks"}
TOLD = BLOCKS | {"self_conditioning": True, "chain_states": True, "core_readout": True}
BPTT, ONE_PASS = {"name": "bptt", "trained_iterations": 2}, {"name": "one_pass"}


@pytest.mark.parametrize(
    ("objective", "backend"),
    [
        *((objective, "aot_eager_decomp_partition") for objective in (TOLD, BPTT, ONE_PASS)),
        *(pytest.param(objective, "inductor", marks=pytest.mark.slow) for objective in (BLOCKS, TOLD, BPTT, ONE_PASS)),
    ],
)
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_its_warm_up_leaves_no_trace(
    compile_by, objective, backend, tiny_config, tmp_path
):
    compile_by(backend)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_gated_mlp_has_the_gradients_of_a_plain_one(compile_by, dtype):
    """Of a width that no number of parts divides (see halves.py)."""
    compile_by("inductor")
    torch.manual_seed(0)
    mlp, x, above = GatedMLP(24, 321).to(dtype), torch.randn(2, 7, 24, dtype=dtype, requires_grad=True), torch.randn(2, 7, 24, dtype=dtype)
    found = []
    for function in (mlp, torch.compile(mlp, fullgraph=True, dynamic=False)):
        out = function(x)
        found.append((out, *torch.autograd.grad(out, (x, *mlp.parameters()), above)))
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_a_machine_without_a_compiler_is_refused_in_one_sentence(tiny_config, rdtrain, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    path = tiny_config(model=SMALL)
    result = rdtrain("train", "--config", path, "engine.compile=true", forked=False)  # torch reads CXX where it is imported
    refused(result, "torch.compile failed", "install a C++ compiler, or set engine.compile=false")


@pytest.mark.parametrize(
    ("settings", "autocast", "apart"),
    [
        pytest.param({"self_conditioning": True, "core_readout": True}, torch.bfloat16, False, marks=pytest.mark.slow),
        ({"layer_checkpointing": "full", "layer_checkpointing_interval": 3}, torch.float32, True),
        ({"name": "bptt", "trained_iterations": 2, "depth": "fixed", "layer_checkpointing": "selective", "layer_checkpointing_interval": 4},
         torch.bfloat16, False),
    ],
)
def test_the_estimate_of_activations_is_what_compiled_code_saves(settings, autocast, apart, build_model, monkeypatch):
    """What the partitioner saves that grows with tokens: weights, their casts and states of random number generators apart. No kernels are
    made of what it divides. Of layers in 2/2/1 interval 3 takes the first and the core's last, and 4 the first and the coda's."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    objective = build_objective(ObjectiveSettings(**settings), NoiseSettings(), 4)
    model = build_model(width=64, mlp_width=160, prelude_layers=2, core_layers=2, coda_layers=1, vocab_size=30, **objective.model_fields)
    model.checkpoint_layers(objective.layer_checkpointing, objective.layer_checkpointing_interval)
    objective.compile(model, [part for part in model.modules() if isinstance(part, SandwichBlock)] if apart else ())
    shapes = {tuple(weight.shape) for weight in model.parameters()} | {tuple(reversed(weight.shape)) for weight in model.parameters()}
    saved = {}

    def note(tensor):
        if tensor.dim() and tuple(tensor.shape) not in shapes and tensor.dtype != torch.uint8:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address is used again
        return tensor

    tokens = torch.randint(30, (8, 48), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", autocast, autocast != torch.float32):
        objective(model, tokens, SampleRandom(0, range(8), torch.device("cpu"), 0))
    torch._dynamo.reset()
    actual = sum(storage.nbytes() for storage in saved.values()) / (8 * 47)
    inside = 0
    if objective.layer_checkpointing == "selective":  # what the coda's last computes again is there in its backward pass alone
        inside = 2 * (4 * 64 + 160) + 4 * 4
    estimate = activation_bytes(model.config, objective, Passes(autocast.itemsize, 4, "cpu", True, apart), seed=0, steps=1) - inside
    assert estimate == pytest.approx(actual, rel=0.02)
