"""Block-parallel training in real processes: against a slow loop, and through the commands that a user types."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rdtrain.config import load_config
from rdtrain.data.loader import Loader, validation_windows
from rdtrain.data.shards import ShardReader
from rdtrain.distributed import World
from rdtrain.errors import UserError
from rdtrain.estimate import Shares, engine_memory, model_on_paper, step_traffic
from rdtrain.metrics import read_metrics
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import DiffusionBlocks
from rdtrain.preparation import Plan
from rdtrain.randomness import SampleRandom
from rdtrain.train import train

CPU = torch.device("cpu")
SETTINGS = {
    "model": {"blocks": 2}, "engine": {"name": "block_parallel"}, "schedule": {"steps": 18},
    "noise": {"partition": "equal_information", "share_at_sigma_max": 0.3},
    "checkpoint": {"interval": 9}, "evaluation": {"interval": 9, "sequences": 5},
}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_weights_messages_and_memory_are_those_of_a_slow_loop(ranks, tmp_path, processes):
    """Two blocks on groups of one rank and of two."""
    result = ranks(tmp_path, script="tests/distributed/block_parallel_process.py", gpus=True, number=processes)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len((tmp_path / "right.txt").read_text().splitlines()) == 4


def recorded(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in read_metrics(folder / "metrics.jsonl")[1:]]


def test_a_run_resumes_bit_for_bit_exports_one_model_and_goes_on_as_an_untied_run(tiny_config, tmp_path, ranks, rdtrain):
    path, run = tiny_config(**SETTINGS), tmp_path / "run"
    result = ranks("--config", path)
    assert result.returncode == 0, result.stderr
    first, records = recorded(run), read_metrics(run / "metrics.jsonl")
    facts, config = json.loads((run / "run.json").read_text()), load_config(path)
    assert facts["block_parallel"]["group_ranks"] == 1 and facts["block_parallel"]["reduced_bytes_per_step"]["core"] == 0
    paper = model_on_paper(ModelConfig(**facts["model"]))
    shares = Shares.of(paper, config, DiffusionBlocks(config.noise, 4, blocks=2), 2)
    held, memory = facts["block_parallel"]["held_bytes_per_rank"], engine_memory(shares, config, 4, 1)
    assert (held["weights"], held["gradients"]) == (memory.weights, memory.gradients)
    assert held["optimizer_state"] == pytest.approx(memory.optimizer_state, rel=0.01)  # step counts aside
    traffic = step_traffic(shares, config, DiffusionBlocks(config.noise, 4, blocks=2), 4, 1, 2)
    assert traffic.bytes == facts["block_parallel"]["reduced_bytes_per_step"]["shared"]  # a ring of two: half of it, there and back
    for record in records[1:]:  # a step trains all blocks
        assert {k // 2 for k, loss in enumerate(record["loss_by_iteration"]) if loss is not None} == {0, 1}

    # The first loss and the last held-out likelihood, by the whole model in this process.
    whole = ModelConfig(**facts["model"])
    torch.manual_seed(config.run.seed)
    model, loader, loss = RecurrentDepthLM(whole), Loader(ShardReader(Path(config.data.train)), 16, config.run.seed), 0.0
    for block, probability in enumerate((0.65, 0.35)):
        objective, samples = DiffusionBlocks(config.noise, 4, blocks=2), range(4 * block, 4 * block + 4)
        objective.train_only(block)
        loss += probability * objective(model, loader.batch(samples), SampleRandom(config.run.seed, samples, CPU)).value.item()
    assert first[0][1] == pytest.approx(loss, rel=1e-5)
    last = run / "checkpoints/step-00000018"
    model.load_state_dict(load_file(last / "model.safetensors"))
    held_out = validation_windows(ShardReader(Path(config.data.validation)), 16, 5)
    with torch.no_grad():
        nll = DiffusionBlocks(config.noise, 4, blocks=2).held_out_nll(model, held_out, SampleRandom("validation", range(5), CPU)).mean()
    assert records[-1]["validation_nll"] == pytest.approx(nll.item(), rel=1e-5) and nll < records[0]["validation_nll"] - 0.3

    result = rdtrain("export", run, "--output", tmp_path / "model")
    assert result.returncode == 0 and "bit for bit" in result.stdout, result.stderr
    text = rdtrain("generate", tmp_path / "model", "--prompt", "The function", "--max-new-tokens", "8", "--iterations", "6")
    assert text.returncode == 0 and len(text.stdout) > 20, text.stderr

    weights = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    result = ranks("--config", path)
    assert result.returncode == 0 and "continuing from step 9" in result.stdout, result.stderr
    again = load_file(last / "model.safetensors")
    assert recorded(run) == first and all(again[name].equal(weights[name]) for name in weights)

    shutil.rmtree(last)  # the other way is in block_parallel_process.py
    assert train(load_config(path, ["engine.name=torch"])) == 0
    untied = read_metrics(run / "metrics.jsonl")
    assert recorded(run)[:9] == first[:9] and recorded(run)[9:] != first[9:]
    assert untied[-1]["step"] == 18 and untied[-1]["validation_nll"] < records[0]["validation_nll"] - 0.2


@pytest.mark.parametrize(
    ("ranks", "sections", "words"),
    [
        (4, {"model": {"blocks": 1}}, "model.blocks is 1: set model.blocks"),
        (3, {}, "2 does not divide 3: start a multiple of 2 processes"),
        (1, {}, "2 does not divide 1"),
        (2, {"objective": {"name": "bptt", "trained_iterations": 1}}, "objective.name=bptt trains one core"),
        (2, {"objective": {"chain_states": True}, "batch": {"global_sequences": 6, "micro_sequences": 1}}, "use a multiple of 4"),
    ],
)
def test_what_has_no_groups_of_ranks_is_refused_before_any_work(tiny_config, ranks, sections, words):
    noise = {} if "objective" in sections else SETTINGS["noise"]
    config = load_config(tiny_config(**SETTINGS | {"noise": noise} | sections))
    with pytest.raises(UserError, match=words) as refused:
        Plan.make(config, World(0, ranks, 0, CPU))
    assert not str(refused.value).endswith(".")
