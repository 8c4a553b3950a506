"""Self-conditioning, training on the chain's own states and the core readout through the commands: train, resume, export, generate,
and what is refused."""

import json

import pytest
from safetensors.torch import load_file

from rdtrain.config import load_config
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.train import train

ALL = {"self_conditioning": True, "chain_states": True, "core_readout": True}


def test_all_three_train_resume_bit_for_bit_export_and_generate(tiny_config, tmp_path, rdtrain, alone, assert_resumes_bit_for_bit):
    # Without what would make the tokens depend little on where the chain is read.
    objective = ALL | {"posterior_readout": False, "wiener_input": False, "optional_state": False}
    config = tiny_config(objective=objective, schedule={"steps": 40}, checkpoint={"interval": 20}, evaluation={"interval": 20})
    result = rdtrain("train", "--config", config)
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    nll = [record["validation_nll"] for record in records if "validation_nll" in record]
    assert nll[-1] < nll[0] - 0.5

    last = tmp_path / "run/checkpoints/step-00000040"
    weights = load_file(last / "model.safetensors")
    assert weights["estimate_adapter.weight"].abs().max() > 0 and weights["core_scale"].item() != 1
    assert_resumes_bit_for_bit(load_config(config), last)

    result = rdtrain("export", tmp_path / "run", "--output", tmp_path / "model")
    assert result.returncode == 0 and "bit for bit" in result.stdout, result.stderr
    model = json.loads((tmp_path / "model/config.json").read_text())["model"]
    assert model["self_conditioning"] and model["core_readout"]
    command = (tmp_path / "model", "--prompt", "The function", "--max-new-tokens", "40")
    from_core = ("--chain-readout", "core")
    coda, core, uncached = (alone(*command, *extra) for extra in ((), from_core, (*from_core, "--no-cache")))
    for result in (coda, core, uncached):
        assert result.returncode == 0 and result.stdout.startswith("The function"), result.stderr
    assert coda.stdout != core.stdout == uncached.stdout


@pytest.fixture(params=["diffusion_blocks", "bptt"])
def exported(request, tiny_config, tmp_path, rdtrain):
    """A model without a core readout."""
    assert train(load_config(tiny_config(objective={"name": request.param}, schedule={"steps": 1}))) == 0
    assert rdtrain("export", tmp_path / "run", "--output", tmp_path / "model").returncode == 0
    return request.param, tmp_path / "model"


def test_generating_from_the_core_of_a_model_without_a_core_readout_is_refused(exported, alone, rdtrain, shards, tmp_path, refused):
    name, folder = exported
    result = alone(folder, "--prompt", "A", "--chain-readout", "core")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    expected = "chain_readout=core needs a model" if name == "diffusion_blocks" else "solver and chain_* are settings of a denoising"
    assert f"model: {expected}" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    result = alone(folder, "--chain-readout", "head")
    assert result.returncode == 1 and "chain_readout must be coda or core, and it is head" in result.stderr
    if name == "diffusion_blocks":
        result = rdtrain("evaluate", folder, "--shards", shards / "validation", "--output", tmp_path / "report", "--skip", "likelihood",
                         "--prompts", 2, "--prompt-tokens", 4, "--new-tokens", 2, "--chain-readout", "core")
        refused(result, "chain_readout=core needs a model")


@pytest.mark.parametrize("name", ["bptt", "one_pass"])
@pytest.mark.parametrize("setting", ALL)
def test_settings_of_denoising_blocks_are_refused_for_other_objectives(tiny_config, name, setting):
    with pytest.raises(UserError, match=f"{setting} belongs to name=diffusion_blocks, and name is {name}: leave it out"):
        load_config(tiny_config(objective={"name": name, setting: True}))


def test_self_conditioning_under_bptt_is_refused_by_the_command(tiny_config, rdtrain, refused, tmp_path):
    result = rdtrain("train", "--config", tiny_config(objective={"name": "bptt"}), "objective.self_conditioning=true")
    refused(result, "self_conditioning belongs to name=diffusion_blocks")
    assert not (tmp_path / "run").exists()
