"""`rdtrain plan`: its arithmetic, by hand and by the dry run of the same world, and that what it proposes does fit."""

import json

import pytest
import torch

from rdtrain.config import load_config, override
from rdtrain.distributed import World
from rdtrain.dry_run import dry_run
from rdtrain.hardware import GPUS
from rdtrain.plan.costing import Cluster, batch_for, cost, with_batch

VOCABULARY = 800
CUDA = torch.device("cuda")


@pytest.fixture
def config(tiny_config):
    """A model large enough for gigabytes to mean something, on paper."""
    model = {"width": 2048, "heads": 16, "mlp_width": 6144, "iterations": 8}
    sections = {"batch": {"global_sequences": 64, "micro_sequences": 16}, "data": {"sequence_length": 1024}}
    return load_config(tiny_config(model=model, engine={"name": "deepspeed", "zero_stage": 1}, **sections))


def cluster(count: int, memory: float = 80, **changes) -> Cluster:
    gpu = next(gpu for gpu in GPUS if gpu.name == "h100")._replace(memory=memory)
    return Cluster(gpu, count, **{"reserve": 0.0, "mfu": 0.5, "network": 50.0} | changes)


def test_time_traffic_and_memory_are_those_of_the_formulas_and_the_dry_run(config):
    one, many = (cost("blocks", config, VOCABULARY, cluster(count), tokens=1e9) for count in (1, 16))
    assert one.sent == 0 and one.training_flops == 1e9 * one.flops_per_token
    assert one.step_seconds == pytest.approx(64 * 1024 * one.flops_per_token / (0.5 * 989.4e12))
    assert one.training_seconds == pytest.approx(1e9 * one.flops_per_token / (0.5 * 989.4e12))
    parameters = sum(many.parameters.values())
    assert many.sent == pytest.approx((2 * 2 + 2) * parameters * 15 / 16)  # ZeRO 1 in bf16: an all-reduce and an all-gather
    assert many.sending_seconds == pytest.approx(many.sent / 50e9)  # two nodes of eight
    assert cost("blocks", config, VOCABULARY, cluster(8), 1e9).sending_seconds == pytest.approx(6 * parameters * 7 / 8 / 450e9)
    slow = cost("blocks", config, VOCABULARY, cluster(16, network=1e-3), 1e9)
    assert slow.step_seconds == slow.sending_seconds > many.step_seconds
    told = dry_run(with_batch(config, 64, 4), World(0, 16, 0, CUDA))[0]
    assert many.micro_sequences == 4 and f"memory of a rank  {many.peak / 2**30:27,.2f} GiB".split() == next(
        line for line in told.splitlines() if line.startswith("memory of a rank  ")
    ).split()[:6]


def test_a_drawn_depth_counts_as_deep_as_any_step_of_the_run_goes(config):
    """However long the schedule, or --tokens, makes the run."""
    drawn = override(config, ["objective.name=bptt", "objective.gradient=full", "objective.depth=poisson"])
    per_step = 64 * 1024
    flops = cost("full", drawn, VOCABULARY, cluster(1), per_step).flops_per_token * per_step
    for_flops = override(drawn, ["schedule.steps=null", f"schedule.training_flops={500.5 * flops}"])
    told = dry_run(for_flops, World(0, 1, 0, CUDA))[0]
    peak = cost("full", for_flops, VOCABULARY, cluster(1), None).peak
    assert f" {peak / 2**30:,.2f} GiB  at its peak" in told
    assert peak == cost("full", override(drawn, ["schedule.steps=500"]), VOCABULARY, cluster(1), None).peak
    assert peak == cost("full", drawn, VOCABULARY, cluster(1), 500.5 * per_step).peak
    assert peak > 1.2 * cost("full", drawn, VOCABULARY, cluster(1), per_step).peak


def test_rows_of_documents_train_the_tokens_that_they_have(tiny_config, tmp_path, rdtrain):
    path = tiny_config(data={"rows": "documents", "sequence_length": 4096}, engine={"name": "torch"})
    result = rdtrain("plan", path, "--gpus", 1, "--compare", "blocks", "--output", tmp_path / "plan.json")
    facts = json.loads((tmp_path / "plan.json").read_text())
    told = dry_run(load_config(path), World(0, 1, 0, CUDA))[0]
    found, config, filled = facts["costs"][0], facts["config"], facts["filled"]
    assert filled < 1 and f"{filled:.1%} of them filled" in result.stdout
    assert f"{found['flops_per_token']:.3e} a token" in told and f"{found['training_flops']:.3e} in all" in told
    tokens = found["training_flops"] / found["flops_per_token"]
    assert tokens == pytest.approx(config["schedule"]["steps"] * found["global_sequences"] * 4096 * filled)


def test_checkpointing_takes_time_and_gives_memory(config):
    bptt = override(config, ["objective.name=bptt", "objective.gradient=full", "objective.depth=fixed"])
    plain, again = (cost("full", override(bptt, [f"objective.activation_checkpointing={on}"]), VOCABULARY, cluster(1), 1e9)
                    for on in ("false", "true"))
    assert again.flops_per_token == plain.flops_per_token and again.recomputed_per_token > plain.recomputed_per_token == 0
    assert again.step_seconds / plain.step_seconds == pytest.approx(1 + again.recomputed_per_token / plain.flops_per_token)
    assert again.memory.activations < plain.memory.activations / 2


def test_the_largest_micro_batch_fits_and_the_next_does_not(config):
    room = cost("blocks", with_batch(config, 64, 8), VOCABULARY, cluster(1), 1e9).peak / 2**30 + 0.01
    found = cost("blocks", config, VOCABULARY, cluster(1, memory=room), 1e9)
    assert not found.fits and found.largest_micro == 8 and found.change == ["batch.micro_sequences=8"]
    assert cost("blocks", override(config, found.change), VOCABULARY, cluster(1, memory=room), 1e9).fits


@pytest.mark.parametrize("arm", ["blocks", "full"])
def test_what_is_proposed_fits(config, arm):
    """From a smaller micro-batch, over checkpointing and sharding, to more GPUs for a model that no setting makes small enough."""
    if arm == "full":
        config = override(config, ["objective.name=bptt", "objective.gradient=full"])
    large = override(config, ["model.width=16384", "model.heads=128", "model.mlp_width=49152"])
    kinds = set()
    for config, memory in [(config, memory) for memory in (2.6, 2.87, 4, 6, 9, 14, 40, 1000)] + [(large, 10)]:
        found = cost(arm, config, VOCABULARY, cluster(4, memory=memory), None)
        if found.fits:
            assert found.change is None and found.largest_micro >= 16
            continue
        gpus, changes = (int(found.change[0].split()[0]), found.change[1:]) if "GPUs" in found.change[0] else (4, found.change)
        kinds |= {"GPUs"} if gpus > 4 else {change.partition("=")[0] for change in changes}
        changed = override(config, [word for change in changes for word in change.split()])
        assert cost(arm, changed, VOCABULARY, cluster(gpus, memory=memory), None).fits, (memory, found.change)
    assert {"batch.micro_sequences", "objective.layer_checkpointing", "engine.name", "GPUs"} <= kinds


def test_a_batch_that_ranks_cannot_share_grows_to_the_next_that_they_can(config):
    batches = {gpus: batch_for(config, gpus) for gpus in (1, 3, 8, 64, 1000)}
    assert {gpus: (each.batch.global_sequences, each.batch.micro_sequences, grown) for gpus, (each, grown) in batches.items()} == {
        1: (64, 16, False), 3: (66, 11, True), 8: (64, 8, False), 64: (64, 1, False), 1000: (1000, 1, True),
    }


def test_an_engine_that_cannot_is_refused_in_its_row(config):
    found = cost("blocks", override(config, ["engine.name=torch"]), VOCABULARY, cluster(8), 1e9)
    assert "runs in one process" in found.refused and found.memory is None


def test_the_command_writes_what_it_prints(tiny_config, tmp_path, rdtrain, refused):
    path = tiny_config()
    output = tmp_path / "plan.json"
    result = rdtrain("plan", path, "engine.name=fsdp", "--gpus", 1, 10000, "--tokens", "1e9", "--price", 2, "--output", output)
    assert result.returncode == 0, result.stderr
    facts = json.loads(output.read_text())
    assert [(row["gpus"], row["arm"]) for row in facts["costs"]] == [
        (count, arm) for count in (1, 10000) for arm in ("blocks", "truncated", "full")
    ]
    assert facts["vocab_size"] == VOCABULARY and "10,000*" in result.stdout and "10,000, truncated" in result.stdout
    refused(rdtrain("plan", path, "--mfu", 40), "--mfu is a share of the speed on paper, and it is 40.0: give one in (0, 1]")
    refused(rdtrain("plan", path, "--gpu", "l4", "--reserve", "inf"), "--reserve is a part of the GPU's 21.9 GiB, and it is inf")
    refused(rdtrain("plan", path, "data.train=nowhere"), "the number of tokens in the vocabulary is not known", "or give --vocab-size")
