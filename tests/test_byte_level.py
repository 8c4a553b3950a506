"""A tokenizer of Hugging Face's kind all the way: shards, parts, training, checkpoints, evaluation, export, transformers."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rdtrain.config import load_config
from rdtrain.data.inspection import inspect_shards
from rdtrain.data.sharding import merge_parts, write_shards
from rdtrain.data.shards import ShardReader
from rdtrain.data.tokenizer_import import import_tokenizer
from rdtrain.errors import UserError
from rdtrain.evaluate.models import find_model
from rdtrain.export import export
from rdtrain.model.generation import Sampling, TextGenerator
from rdtrain.model.tokenizer import Tokenizer
from rdtrain.train import train

TEXT = "The function <|begin|>\n\n  <|user|>\u2581 \U0001f600 e\u0301 <|unused_0|>"


def test_from_text_to_text(byte_level_folder, text_folder, tiny_config, tmp_path, model_code_folder):
    tokenizer, _ = import_tokenizer(byte_level_folder, tmp_path / "tokenizer", multiple_of=64)
    inputs = [text_folder / "1.txt", text_folder / "3.txt"]
    write_shards(inputs, tokenizer, tmp_path / "shards")
    for part in (1, 2):
        write_shards(inputs, tokenizer, tmp_path / f"part{part}", part=(part, 2))
    merge_parts([tmp_path / "part2", tmp_path / "part1"], tmp_path / "merged")
    reader = ShardReader(tmp_path / "shards", tokenizer.hash)
    assert reader.manifest == ShardReader(tmp_path / "merged").manifest and not list(reader.find_damage())
    assert reader.manifest["files"]["tokenizer.json"]["sha256"] == reader.manifest["tokenizer_hash"] == tokenizer.hash
    ids = reader.read(*reader.documents[:2]).tolist()
    assert (ids[0], ids[-1]) == (0, 1) and tokenizer.decode(ids) == inputs[0].read_text()
    assert f"tokens 0 to 199:\n\n<|begin|>{inputs[0].read_text()[:50]}" in inspect_shards(tmp_path / "shards")

    shards = {"train": str(tmp_path / "shards"), "validation": str(tmp_path / "merged")}
    config = load_config(tiny_config(data=shards, schedule={"steps": 1}, objective={"name": "bptt", "gradient": "full", "depth": "fixed"}))
    assert train(config) == 0
    source = find_model(Path(config.run.folder))
    assert source.tokenizer().hash == tokenizer.hash and source.load("cpu").tokenizer.hash == tokenizer.hash
    model = tmp_path / "model"
    export(Path(config.run.folder), model)
    assert (model / "tokenizer.json").read_bytes() == tokenizer.file.read_bytes() and "safetensors and tokenizers;" in (
        model / "README.md").read_text()
    assert json.loads((model / "config.json").read_text())["model"]["unused_tokens"] == 4
    generator = TextGenerator.load(model, "cpu")
    written = "".join(generator.stream("The", 20, sampling=Sampling(temperature=0.0)))

    theirs = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert type(theirs).__module__.startswith("transformers."), "no code of ours is needed"
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT, bos=True)
    assert theirs.decode(theirs(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert theirs("<|user|>", add_special_tokens=False, split_special_tokens=False).input_ids == [tokenizer.special_tokens["<|user|>"]]
    assert theirs(["a", "the function"], padding=True).attention_mask[0][0] == 0
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    assert loaded.generation_config.suppress_tokens == [700, 701, 702, 703]
    tokens = loaded.generate(**theirs("The", return_tensors="pt"), max_new_tokens=20, do_sample=False, seed=0)
    assert theirs.decode(tokens[0], skip_special_tokens=True) == "The" + written
    theirs.save_pretrained(tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").hash == tokenizer.hash, "laid out otherwise, it is the same"

    other, _ = import_tokenizer(byte_level_folder, tmp_path / "other")
    shutil.copy(other.file, model)
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        TextGenerator.load(model, "cpu")
    shutil.copy(other.file, source.folder)
    with pytest.raises(UserError, match="^the tokenizer.json in"):
        source.tokenizer()
    with pytest.raises(UserError, match="is damaged .tokenizer.json has"):
        export(source.folder, tmp_path / "again")
    (source.folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is damaged .no tokenizer at"):
        export(source.folder, tmp_path / "again")
