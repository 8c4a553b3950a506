"""What is measured inside of a step, on the plain engine; tests/distributed holds every other engine's norms to a loop."""

import time
from pathlib import Path

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine
from rdtrain.hardware import model_flops_utilization
from rdtrain.measurement import part_of
from rdtrain.metrics import read_metrics
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import DiffusionBlocks
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom
from rdtrain.train import train

CPU = torch.device("cpu")
WORDS = {"embedding": "embedding", "prelude_layers": "prelude", "cores": "core", "coda_layers": "coda", "final_norm": "coda",
         "noise_embedding": "conditioning"}


@pytest.fixture
def engine(build_model):
    objective = DiffusionBlocks(NoiseSettings(), 4)
    model = build_model(**objective.model_fields)
    return build_engine(EngineSettings("torch"), model, objective, OptimizerSettings(gradient_clipping=0.1), 2, 2, World(0, 1, 0, CPU))


def batches(step: int) -> list:
    tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))
    return [(tokens[rows], SampleRandom(0, range(4)[rows], CPU, step)) for rows in (slice(0, 2), slice(2, 4))]


def test_norms_are_those_of_autograds_gradients_and_of_the_weights_before_and_after(engine):
    for step in range(3):
        parameters = dict(engine.model.named_parameters())
        losses = [engine._module(*batch)[0] for batch in batches(step)]
        gradients = torch.autograd.grad(sum(losses) / 2, list(parameters.values()))
        before = [parameter.detach().double() for parameter in parameters.values()]
        engine.measure_step()
        engine.train_step(batches(step), 1e-2 / (step + 1))
        found = engine.norms_by_part()
        squares = {part: torch.zeros(3, dtype=torch.float64) for part in WORDS.values()}
        for (name, parameter), gradient, old in zip(parameters.items(), gradients, before):
            new = parameter.detach().double()
            squares[WORDS[name.split(".")[0]]] += torch.stack([each.square().sum() for each in (gradient.double(), new - old, new)])
        assert engine.gradient_norm() > 0.1  # it was clipped
        assert found["gradient_norm_by_part"] == pytest.approx({part: of[0].sqrt().item() for part, of in squares.items()}, rel=1e-4)
        sizes = {part: (of[1] / of[2]).sqrt().item() for part, of in squares.items()}
        assert found["update_size_by_part"] == pytest.approx(sizes, rel=1e-4)


def test_a_step_that_is_skipped_moves_nothing_and_one_that_is_not_measured_tells_nothing(engine):
    nothing = dict.fromkeys(["embedding", "prelude", "core", "coda", "conditioning"])
    engine.measure_step()
    engine.train_step(batches(0), 1e-2, judge=lambda loss, norm: torch.tensor(True))
    found = engine.norms_by_part(skipped=True)
    assert found["update_size_by_part"] == nothing and found["gradient_norm_by_part"]["core"] > 0
    engine.measurement.end()
    engine.train_step(batches(1), 1e-2)
    assert engine.norms_by_part() == {"gradient_norm_by_part": nothing, "update_size_by_part": nothing}
    assert engine.measurement.pass_seconds() is None and not engine.measurement._squares


def test_an_update_that_is_no_number_is_not_known_and_gradients_before_it_are(engine):
    engine.measure_step()
    engine.train_step(batches(0), 1e30)
    found = engine.norms_by_part()
    assert set(found["update_size_by_part"].values()) == {None} and found["gradient_norm_by_part"]["core"] > 0


def test_passes_are_timed_where_they_train(engine, monkeypatch):
    passes = DiffusionBlocks.__call__
    monkeypatch.setattr(DiffusionBlocks, "__call__", lambda *arguments: time.sleep(0.1) or passes(*arguments))
    engine.train_step(batches(0), 1e-2)
    engine.measure_step()
    engine.train_step(batches(0), 1e-2)
    seconds = engine.measurement.pass_seconds()
    engine.held_out_nll(*batches(0)[0])
    assert 0.2 < seconds == engine.measurement.pass_seconds() < 5


def test_every_parameter_has_a_part(build_model):
    model = build_model(True, self_conditioning=True, core_readout=True, blocks=2, iterations=4)
    assert {part_of(name) for name, _ in model.named_parameters()} == set(WORDS.values())


def test_records_between_which_nothing_is_logged_measure_the_step_that_they_end_with(tiny_config, tmp_path):
    for name, interval in (("often", 1), ("seldom", 3)):
        assert train(load_config(tiny_config(name, logging={"interval": interval}))) == 0
    often = {record["step"]: record for record in read_metrics(tmp_path / "often/metrics.jsonl")}
    seldom = read_metrics(tmp_path / "seldom/metrics.jsonl")
    assert [record["step"] for record in seldom] == [0, 3, 4, 6, 8]
    for record in seldom[1:]:
        for name in ("gradient_norm_by_part", "update_size_by_part"):
            assert record[name] == often[record["step"]][name] and all(record[name].values())
        assert record["mfu"] is None  # of a CPU


def test_every_key_of_a_record_is_explained(tiny_config, tmp_path):
    for name, objective in (("blocks", {}), ("bptt", {"name": "bptt"})):
        assert train(load_config(tiny_config(name, objective=objective, schedule={"steps": 2}))) == 0
    told = {key for name in ("blocks", "bptt") for record in read_metrics(tmp_path / name / "metrics.jsonl") for key in record}
    page = (Path(__file__).parent.parent / "docs/watching.md").read_text()
    assert len(told) > 15 and not {key for key in told if f"`{key}`" not in page}


def test_mfu_is_known_in_bf16_of_gpus_that_are_known():
    facts = {"machine": "NVIDIA H100 80GB HBM3", "device": "cuda", "precision": "bfloat16", "ranks": 8}
    assert model_flops_utilization(4 * 989.4e12, facts) == pytest.approx(0.5)
    for other in ({"precision": "float32"}, {"device": "cpu"}, {"machine": "a GPU of next year"}):
        assert model_flops_utilization(4 * 989.4e12, facts | other) is None
