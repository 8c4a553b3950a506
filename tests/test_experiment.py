"""`rdtrain compare EXPERIMENT.yaml`: from a file to a report, going on where it stopped. But in a slow test, what it calls runs in here."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rdtrain.cli import build_parser
from rdtrain.compare import experiment as module
from rdtrain.compare.experiment import folder_name, load_experiment, run_experiment
from rdtrain.compare.samples import side_by_side
from rdtrain.config import load_config
from rdtrain.data.commands import join_action
from rdtrain.data.sharding import write_shards
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics

ARMS = {"denoising blocks": [], "BPTT": ["objective.name=bptt", "objective.trained_iterations=2"]}


@pytest.fixture
def experiment(tiny_config, tmp_path):
    """Writes an experiment file, and returns it."""
    def write(**changes) -> Path:
        tree = {"config": tiny_config().name, "arms": ARMS, "budget": {"training_flops": 1e9}} | changes
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def calls(monkeypatch):
    """The commands that were called, run in this process."""
    called = []

    def call(command: list[str], log: Path, device: str | None) -> None:
        called.append(command[3] if command[0] == sys.executable else command[0])
        log.write_text("")
        arguments = build_parser().parse_args(join_action(command[3:]))
        arguments.run(arguments)

    monkeypatch.setattr(module, "_call", call)
    return called


def test_arms_get_the_same_budget_and_an_experiment_goes_on_where_it_stopped(experiment, calls, tmp_path):
    path = experiment(seeds=[3, 4], evaluate=["--sequences", "4", "--sequence-length", "16", "--skip", "samples"])
    output = tmp_path / "output"
    text = run_experiment(path, output)
    assert calls == ["bench"] * 2 + ["train"] * 4 + ["evaluate"]
    folders = {f"{arm}-seed-{seed}": (arm, seed) for seed in (3, 4) for arm in ("denoising-blocks", "bptt")}
    budgets = []
    for name, (arm, seed) in folders.items():
        config, facts = load_config(output / name / "config.yaml"), json.loads((output / name / "run.json").read_text())
        assert config.run.seed == seed and config.objective.name == ("bptt" if arm == "bptt" else "diffusion_blocks")
        budgets.append(read_metrics(output / name / "metrics.jsonl")[-1]["training_flops"])
        assert 1e9 - facts["training_flops_per_token"] * facts["tokens_per_step"] < budgets[-1] <= 1e9
    assert "(2 seeds, " in text and "| BPTT |" in text.split("## A step")[1] and "### Held-out likelihood" in text
    page = (output / "report.html").read_text()
    assert page.count("data:image/png") >= 5 and "<h2>A step</h2>" in page
    assert all((output / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("step-time", "memory-by-kind"))
    calls.clear()
    assert run_experiment(path, output) == text and calls == ["train"] * 4  # which find that they are complete
    calls.clear()
    for name in ("bench/bptt/bench.json", "evaluation.json"):
        (output / name).write_text("")  # as after a power cut: it is made again
    assert run_experiment(path, output) and calls == ["bench"] + ["train"] * 4 + ["evaluate"]
    calls.clear()
    path = experiment(seeds=[3, 4], evaluate=["--sequences", "6", "--sequence-length", "16", "--skip", "samples"])
    assert "at most 6 sequences" in run_experiment(path, output) and calls == ["train"] * 4 + ["evaluate"]


def test_a_budget_of_seconds_becomes_steps_by_what_a_step_takes(experiment, calls, tmp_path):
    run_experiment(experiment(budget={"seconds": 0.5}), tmp_path / "output")
    for name in ("denoising-blocks", "bptt"):
        (measured,) = json.loads((tmp_path / f"output/bench/{name}/bench.json").read_text())["measurements"]
        steps = json.loads((tmp_path / f"output/{name}/run.json").read_text())["total_steps"]
        assert steps == max(1, int(0.5 / measured["step_seconds"]["typical"]))


def test_arms_that_are_trained_to_an_nll_end_there_and_are_compared_there(experiment, calls, tmp_path):
    text = run_experiment(experiment(budget={"training_flops": 1e10, "validation_nll": 6.3}), tmp_path / "output")
    records = [read_metrics(tmp_path / f"output/{name}/metrics.jsonl") for name in ("denoising-blocks", "bptt")]
    for run in records:
        nlls = [record["validation_nll"] for record in run if "validation_nll" in record]
        assert nlls[-1] <= 6.3 < min(nlls[:-1]) and run[-1]["training_flops"] < 9e9
    blocks, bptt = (run[-1] for run in records)
    assert f"{blocks['training_flops'] / bptt['training_flops']:.3f} of the training FLOPs to the 6.3000 that BPTT has" in text


@pytest.mark.parametrize("path", sorted(Path("configs/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_of_the_project_is_one(path):
    experiment = load_experiment(path)
    for overrides in experiment.arms.values():
        load_config(path.parent / experiment.config, overrides)
    build_parser().parse_args(["evaluate", "runs/run", "--output", "out", *experiment.evaluate])


@pytest.mark.parametrize("changes, words", [
    ({"budget": {}}, "one of training_flops and seconds must be given"),
    ({"budget": {"seconds": -1.0}}, "it must be positive"),
    ({"arms": {"one": []}}, "needs two arms"),
    ({"arms": {"a b": [], "A B": []}}, "names of their own"),
    ({"arms": {"a": [], "bench": []}}, "other than bench and evaluation"),
    ({"seeds": [1, 1]}, "different seeds"),
    ({"buget": {}}, "did you mean 'budget'"),
    ({"arms": {"a": [], "b": ["objective.name=best"]}}, "'objective.name'"),
    ({"launcher": ["depspeed", "launch/train.py"]}, "begins with depspeed, and there is no such command"),
    ({"evaluate": ["--promts", "5"]}, r"does not take \(unrecognized arguments: --promts 5\)"),
    ({"evaluate": ["--prompts", "0"]}, "--prompts must be at least 1"),
    ({"evaluate": ["--teacher", "nowhere"]}, "nowhere is no folder"),
])
def test_what_is_wrong_with_a_file_is_said_before_anything_runs(experiment, calls, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run_experiment(experiment(**changes), tmp_path / "output")
    assert not calls


def test_arms_with_different_validation_shards_are_refused_before_anything_runs(experiment, calls, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("Another text, of some length. " * 50)
    write_shards([tmp_path / "text.txt"], tokenizer, tmp_path / "other")
    arms = ARMS | {"BPTT": [*ARMS["BPTT"], f"data.validation={tmp_path / 'other'}"]}
    with pytest.raises(UserError, match="denoising blocks and BPTT in .* have different validation shards, .*: give all arms one"):
        run_experiment(experiment(arms=arms), tmp_path / "output")
    assert not calls


def test_a_run_that_fails_is_named_with_its_own_last_words(experiment, tmp_path, capsys):
    path = experiment(launcher=[sys.executable, "-c", "import sys; print('rdtrain: no luck: try again'); print('bye'); sys.exit(7)"])
    loaded = load_experiment(path)
    config = load_config(path.parent / loaded.config)
    config.run.folder = str(tmp_path / "a run")
    with pytest.raises(UserError, match=r"ended with code 7 \(no luck: try again\): see .*run.log") as told:
        module._train_all([module.Run("a", True, config)], loaded)
    for shown, words in ((capsys.readouterr().out, ["rdtrain", "watch", config.run.folder]),
                         (str(told.value), [*loaded.launcher, "--config", f"{config.run.folder}.yaml"])):
        assert shlex.split(shown.split("`")[1]) == words  # as a shell takes it, whatever is in a name


def test_names_become_folders_and_texts_tables(tmp_path):
    assert folder_name("Truncated BPTT, 24 + 8") == "truncated-bptt-24-8" and folder_name("../x") == "x"
    sample = {"model": "a|b", "setting": {"iterations": 4, "temperature": 0.8}, "prompt_number": 0, "number": 0, "prompt": "It *was*",
              "human": " a\n dog", "continuation": " <b>cat</b>"}
    file = tmp_path / "samples-a.jsonl"
    file.write_text("".join(json.dumps(sample | change) + "\n" for change in ({}, {"number": 1}, {"prompt_number": 9})))
    text = side_by_side([file])
    assert "**It \\*was\\***" in text and "| the book | a dog |" in text
    assert text.count("cat") == 1 and "| a\\|b, K = 4, temperature 0.8 | \\<b\\>cat\\</b\\> |" in text
    assert side_by_side([]) == ""


@pytest.mark.slow
def test_an_experiment_runs_by_real_launchers(experiment, tmp_path):
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", "29613", "launch/train.py"]
    path = experiment(launcher=launcher, arms={name: [*words, "engine.name=fsdp"] for name, words in ARMS.items()})
    command = [sys.executable, "-m", "rdtrain.cli", "compare", str(path), "--output", str(tmp_path / "output")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "output/report.html").exists() and json.loads((tmp_path / "output/bptt/run.json").read_text())["ranks"] == 2
