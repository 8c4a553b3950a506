"""An exported folder computes what the training model does, and generates text in a process that cannot import rdtrain."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rdtrain import export as export_module
from rdtrain.checkpoint import load_weights
from rdtrain.config import load_config
from rdtrain.data.output import output_folder
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.model.information import InformationCurve
from rdtrain.model.noise import NoiseSchedule
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.model.weights import write_weights
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.randomness import SampleRandom
from rdtrain.train import train

ALONE = "import sys, runpy; sys.modules['rdtrain'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """What `exported` has made, by objective."""
    return {}


@pytest.fixture(params=["diffusion_blocks", "bptt", "one_pass"])
def exported(request, tiny_config, tmp_path, tmp_path_factory, rdtrain, made) -> Path:
    """The folder of a tiny model, exported by the command, bptt's in many files; its run is beside it."""
    name = request.param
    config = load_config(tiny_config(objective={"name": name}, model={"iterations": 1 if name == "one_pass" else 4}))
    if name not in made:
        assert train(config) == 0
        shards = ["--shard-gigabytes", 3e-5] if name == "bptt" else []
        result = rdtrain("export", tmp_path / "run", "--output", tmp_path / "model", *shards)
        assert result.returncode == 0 and "bit for bit, and its class for transformers the same tokens" in result.stdout, result.stderr
        assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == bool(shards)
        made[name] = tmp_path_factory.mktemp(name) / "copy"
        shutil.copytree(tmp_path, made[name])
    else:
        shutil.copytree(made[name], tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


def all_alone(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """As `alone` does, in a process that Python starts anew, from another directory."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), *arguments], cwd=folder.parent, env=environment, input=stdin, capture_output=True,
        text=True,
    )


def test_the_folder_holds_the_packages_own_files_and_the_training_models_logits(exported, tmp_path):
    package = Path(export_module.__file__).parent / "model"
    for file in package.glob("*.py"):
        assert (exported / file.name).read_bytes() == file.read_bytes()
    assert len({file.stat().st_mode for file in exported.iterdir() if file.is_file()}) == 1  # whoever may read one may read all
    settings = json.loads((exported / "config.json").read_text())
    model = RecurrentDepthLM(ModelConfig(**settings["model"]))
    load_weights(tmp_path / "run/checkpoints/step-00000008", model)
    theirs = export_module.load_exported(exported).TextGenerator.load(exported, "cpu").model
    assert type(theirs) is not RecurrentDepthLM
    config = load_config(tmp_path / "run.yaml")
    objective = build_objective(config.objective, config.noise, config.model.iterations)
    ids = torch.randint(800, (3, 20))
    ours, exported_logits = (objective.next_token_logits(one, ids, SampleRandom(0, range(3), ids.device)) for one in (model, theirs))
    assert torch.equal(ours, exported_logits)
    card, last = (exported / "README.md").read_text(), read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    facts = (
        f"| held-out NLL | {last['validation_nll']:.4f} nats a token, at step 8 |", "| steps | 8 of 8 |",
        "| tokens | 1,024, in 8 sequences of 16 a step |",
        f"| training FLOPs | {last['training_flops']:.3g} |", "| learning rate | 0.01 at its peak", "| engine | torch, 1 x ",
    )
    assert all(fact in card for fact in facts), card


@pytest.mark.parametrize("exported", ["diffusion_blocks"], indirect=True)
def test_rounding_in_bf16_is_no_difference_of_the_class_for_transformers(exported, tmp_path):
    """Its cache has room for other positions, over which attention rounds otherwise, and large weights make other tokens of that."""
    config = json.loads((exported / "config.json").read_text())
    config["model"] |= {"width": 256, "mlp_width": 512, "prelude_layers": 2, "core_layers": 4, "coda_layers": 2}
    config["dtype"] = "bfloat16"
    noise = NoiseSchedule.from_plain(config["noise"], config["information_curve"])
    objective = build_objective(ObjectiveSettings(**config["objective"]), noise.settings, 4)
    for seed in range(3):
        torch.manual_seed(seed)
        model = RecurrentDepthLM(ModelConfig(**config["model"])).requires_grad_(False)
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
        folder = tmp_path / str(seed)
        folder.mkdir()
        export_module.write_folder(folder, config, model.bfloat16(), exported / "tokenizer.model")
        export_module._verify(folder, folder, model, noise, objective)


def test_it_generates_text_where_rdtrain_cannot_be_imported(exported, alone):
    blocked = subprocess.run([sys.executable, "-c", ALONE.split("sys.argv")[0] + "import rdtrain"], capture_output=True, text=True)
    assert "import of rdtrain halted" in blocked.stderr  # the block works
    prompt = ("--prompt", "The function", "--max-new-tokens", "12", "--seed", "3")
    runs = [all_alone(exported, *prompt), alone(exported, *prompt, "--no-cache")]
    for result in runs:
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("The function") and len(result.stdout) > 20
        assert f"K = {json.loads((exported / 'config.json').read_text())['model']['iterations']}" in result.stderr
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.slow
def test_compiled_layers_write_the_same_text(exported, alone, tmp_path, monkeypatch):
    prompt = ("--prompt", "The function", "--max-new-tokens", "12")
    plain, compiled = alone(exported, *prompt), all_alone(exported, *prompt, "--compile")
    assert compiled.returncode == 0 and compiled.stdout == plain.stdout, compiled.stderr
    refused = alone(exported, "--prompt", "A", "--compile", "--no-cache")
    assert refused.returncode == 1 and "--compile is for steps of one position" in refused.stderr
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    refused = all_alone(exported, *prompt, "--compile")
    assert refused.returncode == 1 and "--compile needs a compiler" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("exported", ["diffusion_blocks", "bptt"], indirect=True)
def test_the_generate_command_passes_its_arguments_on(exported, rdtrain):
    result = rdtrain("generate", exported, "--prompt", "A", "--prompt", "B\n", "--iterations", "2", "--max-new-tokens", "5")
    assert result.returncode == 0 and result.stderr.count("K = 2") == 2, result.stderr
    again = rdtrain("generate", exported, "--prompt", "B\n", "--iterations", "2", "--max-new-tokens", "5", "--seed", "1")
    assert result.stdout.endswith("\n" + again.stdout), "the seeds of several texts count on"
    chain = ("--solver", "ancestral", "--chain-temperature", "0.9", "--chain-top-p", "0.9", "--min-p", "0.01")
    changed = rdtrain("generate", exported, "--prompt", "A", "--iterations", "2", "--max-new-tokens", "5", *chain)
    if json.loads((exported / "config.json").read_text())["model"]["noise_conditioning"]:
        assert changed.returncode == 0 and changed.stdout.startswith("A") and changed.stdout.strip() not in result.stdout
        assert "--temperature" in rdtrain("generate", exported, "--help").stdout
    else:
        assert changed.returncode == 1 and "leave them out" in changed.stderr and "Traceback" not in changed.stderr


@pytest.mark.parametrize("exported", ["diffusion_blocks"], indirect=True)
def test_a_conversation_and_a_file_of_prompts_from_the_command_line(exported, tmp_path, alone):
    """Each writes what --prompt does."""
    common = ("--max-new-tokens", "8", "--iterations", "3", "--seed", "5", "--exit", "argmax", "--caches", "2")
    one = alone(exported, "--prompt", "The", *common)
    assert one.returncode == 0 and " used), " in one.stderr and "MiB]" in one.stderr, one.stderr
    talk = all_alone(exported, "--interactive", *common, stdin="The\n:quit\n")
    assert talk.returncode == 0 and "The" + talk.stdout == one.stdout + "\n", talk.stderr
    (tmp_path / "in").write_text('{"prompt": "The"}\n')
    file = alone(exported, "--jsonl", str(tmp_path / "in"), str(tmp_path / "out"), *common)
    line = json.loads((tmp_path / "out").read_text())
    assert file.returncode == 0 and "The" + line["continuation"] == one.stdout and line["setting"]["caches"] == 2, file.stderr


@pytest.mark.parametrize("partition", ["uniform", "equal_information"])
def test_the_noise_levels_that_were_trained_travel_with_the_model(tiny_config, tmp_path, alone, partition):
    """Past the step at which the information curve is first brought up to date, and with another sigma_data."""
    noise = {"partition": partition, "sigma_data": 0.5, "weighting": "edm"}
    config = load_config(tiny_config(noise=noise, schedule={"steps": 17}, evaluation={"interval": 17}))
    assert train(config) == 0
    export_module.export(tmp_path / "run", tmp_path / "model")
    state = json.loads((tmp_path / "run/checkpoints/step-00000017/state.json").read_text())
    schedule = export_module.load_exported(tmp_path / "model").TextGenerator.load(tmp_path / "model", "cpu").noise
    trained = NoiseSchedule(config.noise, InformationCurve(0.002, 80.0, state["objective_state"]["information_curve"]))
    for iterations in (1, 4, 64):
        assert schedule.levels(iterations) == trained.levels(iterations)
    assert schedule.levels(1) == [80.0, 0.0] and schedule.sigma_data(32) == 0.5
    if partition == "equal_information":
        assert schedule.levels(4) != NoiseSchedule(config.noise, InformationCurve.expected(0.002, 80.0)).levels(4)
    result = alone(tmp_path / "model", "--prompt", "A", "--max-new-tokens", "4", "--iterations", "7")
    assert result.returncode == 0 and "K = 7" in result.stderr, result.stderr


def test_a_model_that_has_diverged_is_refused(tiny_config, tmp_path):
    config = tiny_config(optimizer={"learning_rate": 1e30}, schedule={"steps": 3}, checkpoint={"interval": 1}, evaluation={"interval": 9})
    with pytest.raises(UserError, match="^the held-out NLL is nan, as training has diverged"):
        train(load_config(config))
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(UserError, match="step-00000001 computes NaN in place of logits"):
        export_module.export(tmp_path / "run", tmp_path / "diverged")
    assert not list(tmp_path.glob("*diverged*"))


def test_an_export_to_a_full_disk_is_refused_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # what safetensors raises then

    monkeypatch.setattr("rdtrain.model.weights.save_file", full)
    with pytest.raises(UserError, match="^cannot write .*model .*No space left on device.*; make room there or choose another output$"):
        with output_folder(tmp_path / "model", "config.json", False) as folder:
            write_weights({"a": torch.zeros(3)}, folder, 1e9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exported", ["diffusion_blocks"], indirect=True)
def test_a_damaged_folder_and_bad_requests_are_refused_in_one_sentence(exported, tmp_path, rdtrain, alone, refused):
    result = alone(exported, "--prompt", "A", "--iterations", "0")
    assert result.returncode == 1 and "at least one iteration" in result.stderr and "Traceback" not in result.stderr
    result = alone(exported, "--solver", "heun")
    assert result.returncode == 1 and "solver must be one of euler, " in result.stderr and "Traceback" not in result.stderr
    result = alone(exported, "--device", "nonsense")
    assert result.returncode == 1 and "there is no device nonsense here" in result.stderr and "Traceback" not in result.stderr
    result = alone(exported, "--prompt", "A", "--interactive")
    assert result.returncode == 1 and "exclude each other" in result.stderr and "Traceback" not in result.stderr
    refused(rdtrain("export", tmp_path / "run", "--output", exported), "exists already", "overwrite")
    refused(rdtrain("export", tmp_path, "--output", tmp_path / "other"), "holds no checkpoint")
    refused(rdtrain("generate", tmp_path / "run"), "not an exported model", "rdtrain export")
    (tmp_path / "run/__main__.py").write_text("print('a program that is not ours')")
    refused(rdtrain("generate", tmp_path / "run"), "not an exported model", "rdtrain export")
    config = json.loads((exported / "config.json").read_text())
    load = export_module.load_exported(exported).TextGenerator.load
    for section, name, value in (
        ("model", "heads", 0), ("model", "width", 1.5), ("model", "mlp_width", True), ("model", "iterations", "4"), ("model", "wings", 2),
        ("noise", "p_std", None), ("noise", "partition", "even"), ("noise", "sigma_max", float("nan")), ("model", "vocab_size", 2**70),
        (None, "dtype", "x"), (None, "dtype", 3), (None, "format", 2), (None, "information_curve", [1, "x"]), (None, "model", []),
        (None, "noise", None), (None, "information_curve", [1.0]),
        (None, "information_curve", list(range(64, 0, -1))),
    ):
        changed = config | {name: value} if section is None else config | {section: config[section] | {name: value}}
        (exported / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="^.* is not a whole exported model (.*): export it again$"):
            load(exported, "cpu")
    for text in ("{", "[]", "{}"):
        (exported / "config.json").write_text(text)
        with pytest.raises(ValueError, match="^.* is not a whole exported model (.*): export it again$"):
            load(exported, "cpu")
    (exported / "config.json").write_text(json.dumps(config))
    weights = exported / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    result = alone(exported, "--prompt", "A")
    assert result.returncode == 1 and "(model.safetensors has changed since it was written, by its checksum)" in result.stderr
    os.truncate(weights, weights.stat().st_size // 2)
    result = alone(exported, "--prompt", "A")
    assert result.returncode == 1 and "is not a whole exported model" in result.stderr and "Traceback" not in result.stderr
    code = (exported / "chain.py").read_text()
    (exported / "chain.py").write_text(code[: code.index("class Chain")] + "(")
    result = alone(exported, "--prompt", "A")
    assert result.returncode == 1 and "(chain.py, line" in result.stderr and result.stderr.endswith(": export the model again\n")
    assert "Traceback" not in result.stderr
    (exported / "chain.py").unlink()
    result = alone(exported, "--prompt", "A")
    assert result.returncode == 1 and result.stderr == "\nmodel: No module named 'exported_model.chain': export the model again\n"
    assert rdtrain("export", tmp_path / "run", "--output", exported, "--overwrite").returncode == 0
    assert alone(exported, "--prompt", "A", "--max-new-tokens", "2").returncode == 0
