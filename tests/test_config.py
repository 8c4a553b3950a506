"""A config is checked in full before any work starts, and every fault is one sentence with the key's name and the mend."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from rdtrain.config import Config, config_to_yaml, load_config
from rdtrain.errors import UserError

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(config))
    assert load_config(copy) == config


def test_without_a_file_the_defaults_hold():
    assert load_config(None) == Config()


def test_a_run_may_continue_with_other_layers_checkpointed():
    changed = load_config(None, ["objective.layer_checkpointing=full", "objective.layer_checkpointing_interval=4"])
    assert changed.result_settings() == load_config(None).result_settings() and changed != load_config(None)


def test_overrides_win_and_numbers_are_read_as_everybody_means_them(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optimizer:\n  learning_rate: 1e-3\nschedule:\n  steps: 5\n")
    config = load_config(file, ["optimizer.learning_rate=3e-4", "run.name=a name", "schedule.steps=null", "schedule.training_flops=2e12"])
    assert (config.optimizer.learning_rate, config.run.name) == (3e-4, "a name")
    assert (config.schedule.steps, config.schedule.training_flops) == (None, 2e12)
    assert [load_config(None, [f"run.seed={text}"]).run.seed for text in ("0", "10", "1_000", "0x10")] == [0, 10, 1000, 16]


@pytest.mark.parametrize("name", ["010", "1:30", "0b1", "'3e-4'", "'.5e3'", "'10'", "'0x1f'", "'yes'", "'.inf'"])
def test_a_text_that_looks_like_a_number_comes_back_as_text(name, tmp_path):
    config = load_config(None, [f"run.name={name}"])
    (tmp_path / "copy.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config and config.run.name == name.strip("'")


def test_what_is_wrong_may_be_on_the_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {seed: 1}")
    with pytest.raises(UserError, match="'run.seed' in .*a.yaml and the command line is of the wrong type: .* integer, and it is '010'"):
        load_config(tmp_path / "a.yaml", ["run.seed=010"])


def test_a_base_is_read_first_and_only_what_differs_is_replaced(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {width: 64, heads: 2}\nrun: {seed: 3}\n")
    (tmp_path / "arm.yaml").write_text("base: base.yaml\nmodel: {heads: 4}\n")
    config = load_config(tmp_path / "arm.yaml")
    assert (config.model.width, config.model.heads, config.run.seed) == (64, 4, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {widht: 3}", ["unknown key 'model.widht'", "did you mean 'model.width'?"]),
        ("modle: {}", ["unknown key 'modle'", "did you mean 'model'?"]),
        ("zzz: 1", ["unknown key 'zzz'", "the keys there are run, data, model"]),
        ("model: {width: '512'}", ["'model.width'", "wrong type", "integer", "'512'"]),
        ("model: {width: 512.0}", ["'model.width'", "integer", "512.0"]),
        ("optimizer: {learning_rate: fast}", ["'optimizer.learning_rate'", "number", "'fast'"]),
        ("engine: {zero_stage: 4}", ["'engine.zero_stage'", "0, 1, 2 or 3", "4"]),
        ("engine: {name: horovod}", ["'engine.name'", "'deepspeed', 'fsdp', 'block_parallel' or 'torch'"]),
        ("engine: {zero_stage: 3, compile: true}", ["'engine'", "compile cannot go with zero_stage=3", "name=fsdp, or leave compile off"]),
        ("engine: {name: fsdp, compile: true, cuda_graph: true}", ["'engine'", "cuda_graph captures what compile makes"]),
        ("engine: {cuda_graph: true}", ["'engine'", "cuda_graph captures what compile makes", "set compile=true"]),
        ("engine: {precision: fp8}", ["'engine'", "precision=fp8 scales and rounds in compiled code", "set compile=true"]),
        ("engine: {name: fsdp, offload_optimizer: true}", ["'engine'", "offload_optimizer works with name=deepspeed"]),
        ("engine: {zero_stage: 0, offload_optimizer: true}", ["'engine'", "zero_stage 1 to 3"]),
        ("data: {rows: documents, document_masking: true}", ["'data'", "document_masking belongs to rows=packed", "leave it out"]),
        ("model: 3", ["'model'", "must be a section"]),
        ("model: {iterations: 0}", ["'model'", "iterations must be at least 1, and it is 0"]),
        ("model: {width: 100, heads: 8}", ["multiple of 2 * heads"]),
        ("noise: {sigma_min: 2.0, sigma_max: 1.0}", ["sigma_min must be positive and below sigma_max", "2.0 and 1.0"]),
        ("noise: {share_at_sigma_max: 1.5}", ["share_at_sigma_max must lie in [0, 1]"]),
        ("noise: {partition: equal}", ["'noise.partition'", "'equi_probability', 'uniform' or 'equal_information'"]),
        ("noise: {sigma_data: -1.0}", ["sigma_data must be positive", "-1.0"]),
        ("schedule: {steps: 5, training_flops: 1e9}", ["one of steps and training_flops", "not both"]),
        ("schedule: {}", ["one of steps and training_flops"]),
        ("objective: {name: bptt, trained_iterations: 0}", ["trained_iterations must be at least 1, and it is 0"]),
        ("objective: {name: one_pass, gradient: full}", ["gradient belongs to name=bptt, and name is one_pass: leave it out"]),
        ("data: {sequence_length: 0}", ["sequence_length must be at least 1"]),
        ("checkpoint: {keep: 0}", ["interval and keep must be at least 1"]),
        ("checkpoint: {interval: 100, keep_every: 250}", ["keep_every must be 0 or a multiple of interval=100, and it is 250"]),
        ("model: [1, 2", ["not valid YAML"]),
        ("data:\n  mixture:\n    web: 1\n    web: 2", ["'web' stands twice in one mapping", "line 4"]),
        ("- a\n- b", ["must hold sections", "list"]),
        ("base: missing.yaml", ["missing.yaml does not exist"]),
        ("base: bad.yaml", ["its own base"]),
    ],
)
def test_each_fault_is_one_sentence(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("override", ["width=3", "model.width", "a.b.c=1", ".=1"])
def test_an_override_of_another_form_is_refused(override):
    with pytest.raises(UserError, match="is not of the form section.key=value"):
        load_config(None, [override])


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="binary.yaml cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_the_command_prints_every_setting(rdtrain):
    result = rdtrain("train", "--config", CONFIGS[0], "run.seed=5", "--print-config")
    assert result.returncode == 0
    assert yaml.safe_load(result.stdout) == dataclasses.asdict(load_config(CONFIGS[0], ["run.seed=5"]))


def test_the_command_refuses_a_typo_before_any_work(rdtrain, refused, tmp_path):
    refused(rdtrain("train", f"run.folder={tmp_path}/run", "model.iterations=0"), "iterations must be at least 1")
    assert not (tmp_path / "run").exists()
