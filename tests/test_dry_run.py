"""`rdtrain train --dry-run`: what it tells of a run is true of that run, and what a start would refuse it refuses."""

import gc
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from rdtrain.activations import Passes, activation_bytes
from rdtrain.config import config_to_yaml, load_config
from rdtrain.distributed import World
from rdtrain.dry_run import dry_run
from rdtrain.errors import UserError
from rdtrain.estimate import parameters_by_part
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.randomness import SampleRandom
from rdtrain.run_folder import refuse_unusable
from rdtrain.train import train

PROJECT = Path(__file__).parent.parent
UNITS = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}


def table(output: str) -> dict[str, str]:
    """The second column by the first."""
    rows = (re.split(r" {2,}", line.strip()) for line in output.splitlines() if line)
    return {row[0]: row[1] for row in rows if len(row) > 1}


def size(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * 1024 ** UNITS[unit]


@pytest.mark.parametrize("name", ["diffusion_blocks", "bptt"])
def test_what_it_tells_is_true_of_the_run(tiny_config, tmp_path, rdtrain, name):
    path = tiny_config(objective={"name": name}, schedule={"steps": None, "training_flops": 2e9})
    result = rdtrain("train", "--config", path, "--dry-run")
    assert result.returncode == 0, result.stderr
    told = table(result.stdout)
    assert not (tmp_path / "run").exists()
    assert train(load_config(path)) == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert int(told["steps"].replace(",", "")) == facts["total_steps"]
    assert int(told["parameters, all"].replace(",", "")) == facts["parameters"]
    flops = facts["training_flops_per_token"] * facts["tokens_per_step"]
    assert float(told["FLOPs"].split()[0]) == pytest.approx(flops, rel=1e-3)
    checkpoint = next((tmp_path / "run/checkpoints").glob("step-*"))
    saved = sum(file.stat().st_size for file in checkpoint.iterdir() if "tokenizer" not in file.name)
    assert size(told["checkpoint"]) == pytest.approx(saved, rel=0.15)  # of so small a model names and generators are a part


def test_any_world_is_checked_and_costed_without_being_there(tiny_config, rdtrain, refused, tmp_path):
    path = tiny_config(engine={"name": "deepspeed", "zero_stage": 2}, batch={"global_sequences": 4096})
    one = table(dry_run(load_config(path), World(0, 1, 0, torch.device("cuda")))[0])
    many = table(rdtrain("train", "--config", path, "--dry-run", "--device", "cuda", "--world-size", 1024).stdout)
    assert many["world"] == "1024 x cuda" and many["parameters, all"] == one["parameters, all"]
    assert size(many["memory of a rank, optimizer state"]) == pytest.approx(size(one["memory of a rank, optimizer state"]) / 1024, rel=0.1)
    assert size(one["sent by a rank in a step"]) == 0 < size(many["sent by a rank in a step"])
    refused(rdtrain("train", "--config", path, "--dry-run", "--world-size", 3), "batch.global_sequences=4096 is not a multiple of")
    with pytest.raises(UserError, match="engine.name=torch runs in one process, and there are 2"):
        dry_run(load_config(path, ["engine.name=torch"]), World(0, 2, 0, torch.device("cuda")))
    captured = ["engine.name=torch", "engine.compile=true", "engine.cuda_graph=true"]
    for device, more in (("cpu", "batch.global_sequences=4096"), ("cuda", "objective.name=bptt"), ("cuda", "model.blocks=2"),
                         ("cuda", "objective.chain_states=true")):
        with pytest.raises(UserError, match="engine.cuda_graph is for CUDA devices, and for a pass that is the same in every step"):
            dry_run(load_config(path, [*captured, more]), World(0, 1, 0, torch.device(device)))
    graph, plain = (table(dry_run(load_config(path, [*captured, f"engine.cuda_graph={on}"]), World(0, 1, 0, torch.device("cuda")))[0])
                    for on in ("true", "false"))
    gradients = [size(each["memory of a rank, gradients"]) for each in (graph, plain)]
    assert gradients[0] == pytest.approx(2 * gradients[1], rel=0.01)
    refused(rdtrain("train", "--config", path, "--world-size", 2), "--world-size and --device belong to --dry-run")


def test_a_folder_that_cannot_take_the_run_is_refused_beside_the_table(tiny_config, tmp_path, rdtrain, refused):
    path = tiny_config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/letters.txt").write_text("dear")
    keep = 10**13
    result = rdtrain("train", "--config", path, "--dry-run", f"checkpoint.keep={keep}", f"schedule.steps={keep}")
    refused(result, "exists and is not a run of rdtrain", "; the checkpoints to come of", "lower checkpoint.keep")
    assert "steps" in table(result.stdout)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["letters.txt"]


@pytest.mark.parametrize(
    ("settings", "there", "most"),
    [
        ({"interval": 2, "keep": 2}, [], 3),
        ({"interval": 2, "keep": 9}, [], 4),  # as many as there will be
        ({"interval": 8, "keep": 2}, [], 1),
        ({"interval": 1, "keep": 1, "keep_every": 4}, [], 4),
        ({"interval": 1, "keep": 1, "keep_every": 1}, [], 8),
        ({"interval": 2, "keep": 2}, [2, 4], 3),
    ],
)
def test_room_is_asked_for_checkpoints_that_are_still_to_come(tiny_config, tmp_path, monkeypatch, settings, there, most):
    config, world = load_config(tiny_config(checkpoint=settings)), World(0, 1, 0, torch.device("cpu"))
    for step in there:
        (tmp_path / f"run/checkpoints/step-{step:08d}").mkdir(parents=True)
        (tmp_path / "run/config.yaml").write_text(config_to_yaml(config))
    monkeypatch.setattr("rdtrain.dry_run.checkpoint_bytes", lambda *_: 1000)
    for free, refusals in ((1000 * (most - len(there)), 0), (1000 * (most - len(there)) - 1, 1)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        told, found = dry_run(config, world)
        assert f"{most} at a time at the most" in told and len(found) == refusals, found


def test_a_folder_that_cannot_be_written_is_refused_and_not_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name, reason in (("file", "Not a directory"), ("file/run", "file is a file"), ("x" * 300, "File name too long")):
        with pytest.raises(UserError, match=f"cannot be written .*{reason}.*: choose a run.folder"):
            refuse_unusable(load_config(None, [f"run.folder={tmp_path / name}"]))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=f"{tmp_path} may not be written to"):
        refuse_unusable(load_config(None, [f"run.folder={tmp_path / 'a/b'}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_parts_add_up_to_the_model(build_model):
    model = build_model(True, blocks=2, self_conditioning=True, core_readout=True)
    assert sum(parameters_by_part(model).values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "autocast"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"self_conditioning": True, "core_readout": True}, torch.float32),
        ({"level_per": "token"}, torch.bfloat16),
        ({"name": "bptt", "gradient": "full", "depth": "fixed"}, torch.float32),
        ({"name": "bptt", "trained_iterations": 2, "depth": "fixed"}, torch.bfloat16),
        ({"name": "bptt", "gradient": "full"}, torch.float32),
    ],
)
def test_the_estimate_of_activations_is_what_autograd_saves(settings, autocast, build_model):
    """Every tensor that is saved for the backward pass, but for weights, their casts, and the logits' log-softmax, which is told apart."""
    noise = NoiseSettings(level_per=settings.get("level_per", "sequence"))
    objective = build_objective(ObjectiveSettings(**{key: settings[key] for key in settings if key != "level_per"}), noise, 4)
    model = build_model(width=64, mlp_width=160, prelude_layers=2, core_layers=3, coda_layers=1, vocab_size=30, **objective.model_fields)
    shapes = {tuple(weight.shape) for weight in model.parameters()} | {tuple(reversed(weight.shape)) for weight in model.parameters()}
    saved = {}

    def note(tensor):
        if tensor.dim() and tuple(tensor.shape) not in shapes and tensor.shape[-1] != 30:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address is used again
        return tensor

    tokens = torch.randint(30, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", autocast, autocast != torch.float32):
        objective(model, tokens, SampleRandom(0, range(4), torch.device("cpu"), 0))
    actual = sum(storage.nbytes() for storage in saved.values()) / (4 * 47)
    # of a run of one step, whose depth is that of the objective's
    estimate = activation_bytes(model.config, objective, Passes(autocast.itemsize, 4, "cpu"), seed=0, steps=1)
    assert estimate == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("how, interval", [("selective", 1), ("full", 1), ("full", 2)])
@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16])
def test_the_estimate_of_what_checkpointed_layers_keep_is_what_lives_after_the_forward_pass(how, interval, autocast, build_model):
    """Of two more layers of the core, so that all else is left out; with interval 2, one of each kind. What autograd saves is put where the
    garbage collector sees it; weights and their casts do not grow with tokens."""
    objective = build_objective(ObjectiveSettings(layer_checkpointing=how, layer_checkpointing_interval=interval), NoiseSettings(), 4)
    actual, estimate = [], []
    for layers in (1, 3):
        model = build_model(width=64, mlp_width=160, core_layers=layers, vocab_size=30, **objective.model_fields)
        model.checkpoint_layers(how, interval)
        shapes = {shape for weight in model.parameters() for shape in (weight.shape, weight.shape[::-1])}
        gc.collect()
        old = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]  # kept, so that no id is used again
        before = set(map(id, old))
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", autocast, autocast != torch.float32):
            loss = objective(model, torch.zeros(4, 48, dtype=torch.int64), SampleRandom(0, range(4), torch.device("cpu"), 0))
        new = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and id(thing) not in before]
        kept = [thing for thing in new if thing.shape not in shapes]
        actual.append(sum({thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes() for thing in kept}.values()) / (4 * 47))
        estimate.append(activation_bytes(model.config, objective, Passes(autocast.itemsize, 4, "cpu"), seed=0, steps=1))
        loss.value.backward()
    assert actual[1] - actual[0] == pytest.approx(estimate[1] - estimate[0], rel=0.02)


def test_the_shown_deepspeed_configs_are_what_rdtrain_gives_deepspeed(rdtrain):
    """Each value is explained, and none of ZeRO's is left to DeepSpeed but what is off, of no effect, or unknown to an older version."""
    left = {
        "compute_grad_norm", "parameter_alignment",  # newer than the oldest DeepSpeed that rdtrain runs on
        "offload_param", "zenflow", "offload_optimizer", "cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload",
        "stage3_gather_fp16_weights_on_model_save", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
        "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module",
    }
    readme = (PROJECT / "configs/deepspeed/README.md").read_text()
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for stage in ("0", "1", "2", "3", "3-offload"):
        settings = [f"engine.zero_stage={stage[0]}", *(["engine.offload_optimizer=true"] if "offload" in stage else [])]
        command = ("train", "--print-deepspeed-config", "--world-size", 8, "--device", "cuda", *settings)
        shown = (PROJECT / f"configs/deepspeed/zero-{stage}.json").read_text()
        assert rdtrain(*command).stdout == shown
        zero = json.loads(shown)["zero_optimization"]
        unwritten = names - zero.keys() - left
        of_stage_3 = set(json.loads((PROJECT / "configs/deepspeed/zero-3.json").read_text())["zero_optimization"]) - zero.keys()
        assert unwritten == of_stage_3 & names
        for name in [*json.loads(shown), *zero]:
            assert f"`{name}" in readme, name
