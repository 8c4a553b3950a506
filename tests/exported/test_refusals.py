"""What an export refuses, of what transformers hands it: in one sentence, whatever is wrong with calls, folders and versions."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, DynamicCache

PROJECT = Path(__file__).parent.parent.parent


def test_what_cannot_be_is_refused_in_one_sentence(denoiser, unrolled, load, tmp_path):
    model, ids = denoiser[2], torch.tensor([[1, 14, 15, 92, 65, 35, 89]])
    holes = torch.ones_like(ids)
    holes[0, 3] = 0

    def started(model=model):
        return model(ids, use_cache=True, num_iterations=1).past_key_values

    for words, call in {
        "token 800 is outside the vocabulary of 800": lambda: model(torch.tensor([[800]])),
        "token -1 is outside": lambda: model.generate(torch.tensor([[5, -1]])),
        "with at least one token": lambda: model(ids[:, :0]),
        "must be whole numbers, and they are torch.float32": lambda: model(ids.float()),
        "num_iterations must be a whole number from 1 to 65536, and it is 0": lambda: model.generate(ids, num_iterations=0),
        "and it is 2.0": lambda: model.generate(ids, num_iterations=2.0),
        "seed must be a whole number or a list of them, and it is '3'": lambda: model(ids, seed="3"),
        "labels must be .1, 7., as input_ids are, and they are .1, 6.": lambda: model(ids, labels=ids[:, 1:]),
        "token 900 is outside the vocabulary of 800": lambda: model(ids, labels=ids + (ids == 92) * 808),
        "labels must be whole numbers, and they are torch.float32": lambda: model(ids, labels=ids.float()),
        "must be .batch, tokens. with at least one token, and they are .0, 7.": lambda: model(ids[:0]),
        "attention_mask must be .1, 7., as input_ids are, and it is .2, 7.": lambda: model(ids, attention_mask=holes.new_ones(2, 7)),
        "gives out no attentions": lambda: model(ids, output_attentions=True),
        "this model reads input_ids": lambda: model(ids, inputs_embeds=torch.zeros(1, 7, 16)),
        "it is a DynamicCache: leave it out": lambda: model.generate(ids, past_key_values=DynamicCache()),
        "cannot be guided by a second prompt": lambda: model.generate(ids, guidance_scale=1.5),
        "gives out no iteration_logits": lambda: model.generate(ids, output_iteration_logits=True),
        "caches must be a whole number, and it is '2'": lambda: model.generate(ids, caches="2"),
        "chain_temperature must be a number, and it is .1.": lambda: model.generate(ids, chain_temperature=[1]),
        "exit must be a name": lambda: model.generate(ids, exit=["kl"]),
        "holds 7 positions, and a text of 7 tokens is to go on": lambda: model.generate(ids, past_key_values=started()),
        "holds 7 positions, and a text of 5 tokens is to go on": lambda: model.generate(ids[:, 2:], past_key_values=started()),
        "the cache is empty": lambda: type(started())().crop(-1),
        "reads a prompt in one pass": lambda: model.generate(ids, prefill_chunk_size=2),
        "was started with another model": lambda: model(ids, past_key_values=started(unrolled[2])),
        "must be .1, 14., of what the cache holds": lambda: model(ids, past_key_values=started(), attention_mask=holes),
        "hide nothing but the padding": lambda: model(ids, past_key_values=started(), attention_mask=torch.cat((holes, holes), dim=1)),
        r"crop\(-n\) forgets the last n positions": lambda: started().crop(2),
        "scores a text in one pass": lambda: model(ids, num_iterations=2),
        "solver is a setting of generation": lambda: model(ids, solver="euler"),
        "solver must be one of": lambda: model.generate(ids, solver="heun"),
        "settings of a denoising model": lambda: unrolled[2].generate(ids, solver="ancestral"),
        "must hide columns at the left": lambda: model(ids, attention_mask=holes),
        "set padding_side='left'": lambda: model(ids, attention_mask=1 - holes.cumsum(1).clamp(max=1), use_cache=True),
        "with a cache of its own": lambda: model.generate(ids, use_cache=False),
        "a batch of 1 texts needs as many seeds": lambda: model.generate(ids, seed=[1, 2]),
        "labels are for a text that is scored": lambda: model(ids, labels=ids, use_cache=True),
        "iteration must be one of 0 to 3, and it is -1": lambda: model.with_known_targets(torch.zeros(1, 7, 32), ids, -1, 4),
        "iteration must be one of 0 to 3, and it is 0.5": lambda: model.iterate_one_step(*torch.zeros(2, 1, 7, 32), 0.5, 4),
        "with_known_targets is of a denoising": lambda: unrolled[2].with_known_targets(torch.zeros(1, 7, 32), ids, 0, 4),
        "iteration must be one of 0 to 1": lambda: model.iterate_one_step(torch.zeros(1, 1, 32), torch.zeros(1, 1, 32), 2, 2),
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)

    shutil.copytree(unrolled[1], tmp_path / "a-file-less")
    next((tmp_path / "a-file-less").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="are not whole .*model-00002-"):
        load(tmp_path / "a-file-less")

    def damaged(change) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(denoiser[1], folder)
        change(folder)
        return folder

    def settings(folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    def without_a_weight(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["final_norm.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def pickled(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def flipped(folder):
        content = bytearray((folder / weights).read_bytes())
        content[-1] ^= 1
        (folder / weights).write_bytes(content)

    def described(**changes):
        return lambda folder: settings(folder, model=asdict(denoiser[0].config) | changes)

    weights = "model.safetensors"
    for words, load_it, change in (
        ("are not those of its config.json, beginning with .*final_norm", load, without_a_weight),
        ("are not whole", load, lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes()[:-500])),
        ("are not whole .*model.safetensors has changed since it was written", load, flipped),
        ("are not whole", load, pickled),
        ("/generation_config.json is missing or not whole", load, lambda folder: (folder / "generation_config.json").write_text('{"eos_')),
        ("/generation_config.json is missing or not whole", load, lambda folder: (folder / "generation_config.json").write_text("[]")),
        ("/generation_config.json is missing or not whole", load, lambda folder: (folder / "generation_config.json").unlink()),
        ("/tokenizer_config.json is missing or not whole", load, lambda folder: (folder / "tokenizer_config.json").unlink()),
        ("are not of the shapes", load, described(mlp_width=64)),
        ("heads must be at least 1", AutoConfig.from_pretrained, described(heads=0)),
        ("document_mark must be a token below vocab_size=800, and it is 900", AutoConfig.from_pretrained, described(document_mark=900)),
        ("set it in generation_config, or give it", AutoConfig.from_pretrained, lambda folder: settings(folder, num_iterations=4)),
        ("unknown setting wings", AutoConfig.from_pretrained, lambda folder: settings(folder, model={"wings": 2, "vocab_size": 8})),
        ("max_position_embeddings must be a whole number from 1 on, and it is 'x'", AutoConfig.from_pretrained,
         lambda folder: settings(folder, max_position_embeddings="x")),
        ("there is no tokenizer.model beside", AutoTokenizer.from_pretrained, lambda folder: (folder / "tokenizer.model").unlink()),
        ("its format is 2", AutoConfig.from_pretrained, lambda folder: settings(folder, format=2)),
        ("is not a SentencePiece model", AutoTokenizer.from_pretrained, lambda folder: (folder / "tokenizer.model").write_text("no")),
        ("not the tokenizer that the model was trained with", AutoTokenizer.from_pretrained,
         lambda folder: shutil.copy(PROJECT / "tokenizer/tokenizer.model", folder)),
    ):
        with pytest.raises(ValueError, match=words):
            load_it(damaged(change), trust_remote_code=True) if load_it is not load else load(damaged(change))


@pytest.mark.parametrize("file", ["configuration_rdtrain", "tokenization_rdtrain"])
@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "6.0.0"])
def test_another_version_of_transformers_is_refused_in_one_sentence(monkeypatch, file, version):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__=version))
    spec = importlib.util.spec_from_file_location(f"rdtrain.model.{file}_again", PROJECT / "rdtrain/model" / f"{file}.py")
    with pytest.raises(ImportError, match=f"needs transformers 5, from 5.10 on, and {version} is installed: pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("file", ["configuration_rdtrain", "tokenization_rdtrain"])
def test_files_that_are_loaded_first_name_all_that_they_need(file):
    """Or transformers 4, and 5 before 5.10, would miss one of them before they refuse to be loaded by it."""
    def named(file: str) -> set[str]:  # as transformers finds them
        return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", (PROJECT / "rdtrain/model" / f"{file}.py").read_text(), re.MULTILINE))

    needed, new = set(), named(file)
    while new:
        needed |= new
        new = set.union(*map(named, new)) - needed
    assert needed == named(file)
