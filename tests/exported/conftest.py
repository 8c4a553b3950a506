"""Exported folders of tiny models, as Hugging Face transformers loads them."""

from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rdtrain.export import exported_config, write_folder
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import RecurrentDepthLM
from rdtrain.objectives import ObjectiveSettings


@pytest.fixture(scope="module")
def write(build_model, tokenizer, tmp_path_factory, model_code_folder):
    """A factory of exported folders of tiny models; returns (model, folder)."""

    def make(denoising: bool = True, shard_bytes: float = 5e9, **changes) -> tuple[RecurrentDepthLM, Path]:
        model = build_model(denoising, vocab_size=tokenizer.vocab_size, **changes).requires_grad_(False)
        state = {
            "model": asdict(model.config), "noise": asdict(NoiseSettings()), "objective": asdict(ObjectiveSettings()),
            "objective_state": {}, "precision": "float32", "tokenizer_hash": tokenizer.hash, "step": 1, "tokens_per_step": 1,
            "config": {"data": {"sequence_length": 16}},
        }
        folder = tmp_path_factory.mktemp("exported") / "model"
        folder.mkdir()
        write_folder(folder, exported_config(state), model, tokenizer.file, shard_bytes)
        return model, folder

    return make


@pytest.fixture(scope="session")
def load():
    """A factory of loaded models: of a folder, with transformers' own settings."""
    return lambda folder, **settings: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture(scope="module")
def denoiser(write, load):
    """(our model, its export's folder, the loaded class) of a denoising model with all that one can have."""
    model, folder = write(posterior_readout=True, wiener_input=True, optional_state=True, core_readout=True)
    return model, folder, load(folder)


@pytest.fixture(scope="module")
def unrolled(write, load):
    model, folder = write(False, shard_bytes=20_000)
    return model, folder, load(folder)


@pytest.fixture(params=["denoiser", "unrolled"])
def both(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def hf_tokenizer(denoiser):
    return AutoTokenizer.from_pretrained(denoiser[1], trust_remote_code=True)
