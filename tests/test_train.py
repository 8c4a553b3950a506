"""A training run in one process: it learns, resumes bit for bit, stops when asked, and refuses to mix two runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rdtrain.config import Config, config_to_yaml, load_config
from rdtrain.errors import UserError
from rdtrain.faults import StepJudge
from rdtrain.metrics import read_metrics
from rdtrain.model.information import UNIT
from rdtrain.run_folder import config_like
from rdtrain.train import train


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in read_metrics(folder / "metrics.jsonl")[1:]]


def test_time_in_which_the_host_waits_for_the_device_is_the_steps(tiny_config, tmp_path, monkeypatch):
    read = StepJudge.read

    def slow(judge, last_too):
        time.sleep(0.3)
        return read(judge, last_too)

    monkeypatch.setattr(StepJudge, "read", slow)
    assert train(load_config(tiny_config(schedule={"steps": 6}))) == 0
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["seconds"] > 6 * 0.3


@pytest.mark.parametrize("name", ["diffusion_blocks", "bptt", "one_pass"])
def test_a_run_learns_and_leaves_what_the_documentation_says(tiny_config, tmp_path, name):
    settings = {"objective": {"name": name}, "model": {"iterations": 1} if name == "one_pass" else {}}
    config = load_config(tiny_config(**settings, schedule={"steps": 40}, evaluation={"interval": 20}))
    assert train(config) == 0
    folder = tmp_path / "run"
    records = read_metrics(folder / "metrics.jsonl")
    evaluated = {record["step"]: record["validation_nll"] for record in records if "validation_nll" in record}
    assert list(evaluated) == [0, 20, 40]
    assert evaluated[40] < evaluated[0] - 0.5
    assert json.loads((folder / "run.json").read_text())["total_steps"] == 40
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step-00000036", "step-00000040"]
    if name == "diffusion_blocks":
        assert len(records[1]["loss_by_iteration"]) == 4
    if name == "bptt":
        depths = [record["depth"] for record in records[1:]]
        assert all(depth == int(depth) >= 1 for depth in depths) and len(set(depths)) > 4
        assert sum(depths) / len(depths) == pytest.approx(5, abs=1.8)


@pytest.mark.parametrize(
    "objective", [{"name": "diffusion_blocks"}, {"name": "bptt", "trained_iterations": 2, "activation_checkpointing": True}]
)
def test_an_interrupted_and_resumed_run_is_bit_identical(tiny_config, tmp_path, objective):
    """The depth of each step of bptt is drawn anew, and alike."""
    settings = {"objective": objective, "logging": {"interval": 1}}
    assert train(load_config(tiny_config("whole", **settings))) == 0
    parts = load_config(tiny_config("parts", **settings))
    stopped_at = _stop_in_step(parts, 5)
    assert 4 <= stopped_at < 8
    assert train(parts) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = [load_file(tmp_path / run / "checkpoints/step-00000008/model.safetensors") for run in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_the_information_curve_goes_on_from_a_checkpoint_between_two_updates(tiny_config, tmp_path):
    """Updates are at steps 16 and 32, the checkpoint at 21; iterations of equal information, a level for each token."""
    noise = {"partition": "equal_information", "level_per": "token"}
    settings = {"noise": noise, "schedule": {"steps": 36}, "checkpoint": {"interval": 21}, "evaluation": {"interval": 36}}
    config = load_config(tiny_config(**settings))
    assert train(config) == 0
    whole, last = losses(tmp_path / "run"), tmp_path / "run/checkpoints/step-00000036"
    state, weights = json.loads((last / "state.json").read_text()), load_file(last / "model.safetensors")
    middle = json.loads((tmp_path / "run/checkpoints/step-00000021/state.json").read_text())
    assert sum(middle["objective_state"]["pending"][1]) * UNIT == 5 * 8 * 16  # five steps of 8 sequences of 16 tokens
    assert middle["objective_state"]["information_curve"] != state["objective_state"]["information_curve"]
    shutil.rmtree(last)
    assert train(config) == 0
    assert losses(tmp_path / "run") == whole
    assert json.loads((last / "state.json").read_text())["objective_state"] == state["objective_state"]
    assert all(tensor.equal(weights[name]) for name, tensor in load_file(last / "model.safetensors").items())


def _stop_in_step(config, step: int) -> int:
    """Send this process SIGTERM in the given step of a run; returns the step at which the run stopped."""
    from rdtrain import train as module

    original, calls = module.learning_rate, []

    def learning_rate(at, *arguments):
        if at == step - 1 and not calls:
            calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(at, *arguments)

    module.learning_rate = learning_rate
    try:
        assert train(config) == 143
    finally:
        module.learning_rate = original
    return read_metrics(Path(config.run.folder) / "metrics.jsonl")[-1]["step"]


def test_a_killed_run_continues_from_its_last_checkpoint(tiny_config, tmp_path, rdtrain):
    """SIGKILL leaves no time to save: the steps since the checkpoint are trained again, to the same losses."""
    settings = {"schedule": {"steps": 60}, "checkpoint": {"interval": 5}, "evaluation": {"interval": 60}}
    assert train(load_config(tiny_config("whole", **settings))) == 0
    arguments = ["train", "--config", str(tiny_config("parts", **settings))]
    command = [sys.executable, "-m", "rdtrain.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "parts/metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.exists() or len(read_metrics(metrics)) < 13:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    result = rdtrain(*arguments)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_complete_run_is_left_as_it_is(tiny_config, tmp_path, capsys):
    config = load_config(tiny_config())
    assert train(config) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert train(config) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_run_is_repeated_from_its_own_record(tiny_config, tmp_path, rdtrain, refused):
    assert train(load_config(tiny_config())) == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(facts | {"commit": "another"}))
    result = rdtrain("train", "--like", tmp_path / "run")
    assert result.returncode == 0 and f"commit was another and is {facts['commit']}" in result.stderr, result.stderr
    assert "python was" not in result.stderr
    losses = [[record.get("loss") for record in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("run", "run-again")]
    assert losses[0] == losses[1]
    refused(rdtrain("train", "--like", tmp_path / "run", f"run.folder={tmp_path}/run"), "is the run to be repeated")
    refused(rdtrain("train", "--like", tmp_path), "has no record of a run")


def test_a_run_is_repeated_beside_itself_whatever_it_is_called(tmp_path):
    for name in ("try #2", "a: b", "\\x41 \U0001f600"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(config_to_yaml(Config()))
        (run / "run.json").write_text("{}")
        assert config_like(run, []).run.folder == f"{run}-again"


def test_a_flops_budget_sets_the_steps(tiny_config, tmp_path):
    config = load_config(tiny_config(schedule={"steps": None, "training_flops": 2e9}))
    assert train(config) == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    cost = facts["training_flops_per_token"] * facts["tokens_per_step"]
    assert facts["total_steps"] == int(2e9 / cost) > 1
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["training_flops"] == pytest.approx(facts["total_steps"] * cost)


def test_a_run_ends_where_it_has_come_down_to_the_nll_that_was_asked_for(tiny_config, tmp_path, capsys):
    settings = {"schedule": {"steps": 20}, "evaluation": {"interval": 2}, "checkpoint": {"interval": 50}}
    assert train(load_config(tiny_config("whole", **settings))) == 0
    whole = read_metrics(tmp_path / "whole/metrics.jsonl")
    nll = {record["step"]: record["validation_nll"] for record in whole if "validation_nll" in record}
    lowest = {step: min(nll[before] for before in nll if before < step) for step in nll if step > 2}
    end = next(step for step in lowest if nll[step] < lowest[step])
    path = tiny_config(**settings | {"schedule": {"steps": 20, "until_nll": (lowest[end] + nll[end]) / 2}})
    assert end < 20
    for said in (f"{end} steps, held-out NLL", f"is complete at step {end}; nothing to do"):
        assert train(load_config(path)) == 0 and said in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[:end]
    assert [folder.name for folder in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{end:08d}"]


def test_accumulation_gives_the_losses_of_one_large_batch(tiny_config, tmp_path):
    for micro in (2, 8):
        assert train(load_config(tiny_config(f"micro-{micro}", batch={"micro_sequences": micro}))) == 0
    for (_, loss, norm), (_, whole_loss, whole_norm) in zip(losses(tmp_path / "micro-2"), losses(tmp_path / "micro-8")):
        assert loss == pytest.approx(whole_loss, abs=1e-5) and norm == pytest.approx(whole_norm, rel=1e-4)


def test_a_new_run_starts_from_the_weights_of_another(tiny_config, tmp_path):
    assert train(load_config(tiny_config("first"))) == 0
    last = tmp_path / "first/checkpoints/step-00000008"
    assert train(load_config(tiny_config("second", checkpoint={"start_from": str(last)}))) == 0
    end, start = read_metrics(tmp_path / "first/metrics.jsonl")[-1], read_metrics(tmp_path / "second/metrics.jsonl")[0]
    assert start["validation_nll"] == end["validation_nll"]
    shutil.rmtree(tmp_path / "first")  # what it was started from need not stay for it to go on
    shutil.rmtree(tmp_path / "second/checkpoints/step-00000008")
    assert train(load_config(tiny_config("second", checkpoint={"start_from": str(last)}))) == 0


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tiny_config, tmp_path, rdtrain, refused):
    config = tiny_config(
        optimizer={"learning_rate": 1e30, "gradient_clipping": 0.0}, logging={"interval": 100}, evaluation={"interval": 100},
        schedule={"steps": 40}, checkpoint={"interval": 2},
    )
    refused(rdtrain("train", "--config", config), "not finite", "learning_rate")
    for weights in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_another_config_in_the_same_folder_is_refused(tiny_config, rdtrain, refused):
    config = tiny_config()
    assert rdtrain("train", "--config", config).returncode == 0
    refused(rdtrain("train", "--config", config, "model.width=64"), "model.width=32", "64", "run.folder")


@pytest.mark.parametrize("lost", [lambda file: file.unlink(), lambda file: file.write_text("")])
def test_a_run_whose_config_is_lost_is_kept_until_it_is_put_back(tiny_config, tmp_path, rdtrain, refused, lost):
    config, recorded = tiny_config(), tmp_path / "run/config.yaml"
    assert rdtrain("train", "--config", config).returncode == 0
    lost(recorded)
    refused(rdtrain("train", "--config", config), "has checkpoints, and its config.yaml is missing or empty", "state.json")
    state = json.loads((tmp_path / "run/checkpoints/step-00000008/state.json").read_text())
    recorded.write_text(json.dumps(state["config"]))
    assert "is complete at step 8" in rdtrain("train", "--config", config).stdout


def test_a_folder_that_holds_something_else_is_refused(tiny_config, tmp_path, rdtrain, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/letters.txt").write_text("dear")
    refused(rdtrain("train", "--config", tiny_config()), "exists and is not a run")


def test_a_global_batch_that_cannot_be_shared_is_refused(tiny_config, rdtrain, refused):
    refused(rdtrain("train", "--config", tiny_config(batch={"global_sequences": 7})), "batch.global_sequences=7")


def test_fsdp_in_a_world_of_one_is_plain_pytorch_and_resumes_bit_for_bit(tiny_config, tmp_path, rdtrain):
    for name in ("torch", "fsdp"):
        assert rdtrain("train", "--config", tiny_config(name, engine={"name": name})).returncode == 0
    assert losses(tmp_path / "fsdp") == losses(tmp_path / "torch")
    shutil.rmtree(tmp_path / "fsdp/checkpoints/step-00000008")
    assert rdtrain("train", "--config", tmp_path / "fsdp.yaml").returncode == 0
    assert losses(tmp_path / "fsdp") == losses(tmp_path / "torch")
    torch, fsdp = (load_file(tmp_path / name / "checkpoints/step-00000008/model.safetensors") for name in ("torch", "fsdp"))
    assert torch.keys() == fsdp.keys() and all(torch[name].equal(fsdp[name]) for name in torch)


def test_a_run_continues_in_other_micro_batches_but_not_in_another_precision(tiny_config, tmp_path):
    path = tiny_config()
    assert train(load_config(path)) == 0
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    with pytest.raises(UserError, match=r"a run with engine.precision=auto, and this one has bf16: choose another run.folder"):
        train(load_config(path, ["engine.precision=bf16"]))
    assert train(load_config(path, ["batch.micro_sequences=8"])) == 0
    assert len(losses(tmp_path / "run")) == 8 and losses(tmp_path / "run")[:4] == before[:4]


def test_a_micro_batch_without_an_earlier_iteration_is_refused_where_ranks_must_agree(tiny_config, rdtrain, refused):
    """Of one sequence a micro-batch, those of odd samples have no earlier iteration: ZeRO-3 and FSDP would wait for it for ever."""
    config = tiny_config(objective={"name": "diffusion_blocks", "self_conditioning": True}, batch={"micro_sequences": 1})
    refused(rdtrain("train", "--config", config, "engine.name=fsdp"), "batch.micro_sequences=1", "use at least 2")


def test_the_deepspeed_config_is_printed(tiny_config, rdtrain, refused):
    config = tiny_config(engine={"name": "deepspeed", "zero_stage": 3, "offload_optimizer": True})
    result = rdtrain("train", "--config", config, "--print-deepspeed-config", "optimizer.gradient_clipping=0.5")
    values = json.loads(result.stdout)
    assert (values["gradient_clipping"], values["train_batch_size"], values["zero_optimization"]["stage"]) == (0.5, 8, 3)
    assert values["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    refused(rdtrain("train", "--config", config, "engine.name=torch", "engine.offload_optimizer=false", "--print-deepspeed-config"),
            "engine.name=torch has no DeepSpeed config")


def test_the_torch_engine_refuses_several_processes(tiny_config, ranks, refused):
    refused(ranks("--config", tiny_config()), "engine.name=torch runs in one process, and there are 2")
