"""Compiled training and evaluation meet no new code once each kind of pass is known, whatever depth, sigma, block, samples, documents
and step."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rdtrain.distributed import World
from rdtrain.engine import EngineSettings, build_engine
from rdtrain.model.layers import SandwichBlock
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom

CPU, LENGTH, MICRO, TRAINED = torch.device("cpu"), 8, 2, 2
TRIALS = {"self_conditioning": True, "chain_states": True, "core_readout": True}


@pytest.fixture
def counter(monkeypatch):
    """Stands in for the compiler and counts what it is given."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings, iterations, blocks, precision",
    [
        ({"name": "diffusion_blocks", "layer_checkpointing": "selective"}, 6, 1, "fp32"),
        ({"name": "diffusion_blocks", **TRIALS}, 6, 3, "fp32"),
        ({"name": "bptt", "trained_iterations": TRAINED, "activation_checkpointing": True}, 6, 1, "fp32"),
        ({"name": "bptt", "trained_iterations": TRAINED}, 6, 1, "bf16"),  # whose iterations run copies of the core's weights
        ({"name": "one_pass"}, 1, 1, "fp32"),
    ],
    ids=["diffusion_blocks", "untied_blocks", "bptt", "bptt_bf16", "one_pass"],
)
def test_nothing_is_compiled_after_the_first_steps(settings, iterations, blocks, precision, counter):
    objective = build_objective(ObjectiveSettings(**settings), NoiseSettings(), iterations, blocks)
    shape = ModelConfig(width=16, heads=2, mlp_width=16, prelude_layers=1, core_layers=1, coda_layers=1, iterations=iterations,
                        blocks=blocks, vocab_size=30, document_mark=3 if iterations > 1 else None, **objective.model_fields)
    engine_settings = EngineSettings(name="torch", compile=True, precision=precision)
    engine = build_engine(engine_settings, RecurrentDepthLM(shape), objective, OptimizerSettings(), MICRO, 2, World(0, 1, 0, CPU))

    def samples(first: int, step: int) -> tuple[torch.Tensor, SampleRandom]:
        tokens = torch.randint(30, (MICRO, LENGTH + 1), generator=torch.Generator().manual_seed(first))
        return tokens, SampleRandom(0, range(first, first + MICRO), CPU, step)

    def train(step: int) -> None:
        block = objective.active_block(SampleRandom(0, (), CPU, step))
        engine.train_step([samples(4 * step, step), samples(4 * step + MICRO, step)], 1e-3 / (1 + step), block)
        engine.held_out_nll(*samples(step, step))

    drawn = {step: objective.shared_draw(SampleRandom(0, (), CPU, step)) for step in range(50)}  # its depth or block
    first = [step for step, value in drawn.items() if settings["name"] != "bptt" or value > TRAINED][:2]  # with iterations of both kinds
    others = {value: step for step, value in drawn.items() if step not in first}
    for step in first:
        train(step)
    seen = counter.frame_count
    assert seen >= 3 and (len(others) >= 3 or list(others) == [None])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in list(others.values())[:3]:
            train(step)
        train(100)
    assert counter.frame_count == seen


def test_layers_that_are_compiled_apart_need_no_more_code_than_torch_keeps(counter):
    """Of both kinds, with and without a noise level and gradient, and for the half of a batch that goes through an earlier iteration."""
    settings = ObjectiveSettings(layer_checkpointing="full", layer_checkpointing_interval=2, **TRIALS)
    objective = build_objective(settings, NoiseSettings(), 4)
    model = RecurrentDepthLM(ModelConfig(width=16, heads=2, mlp_width=16, prelude_layers=2, core_layers=2, coda_layers=2, iterations=4,
                                         vocab_size=30, **objective.model_fields))
    model.checkpoint_layers(objective.layer_checkpointing, objective.layer_checkpointing_interval)
    objective.compile(model, [part for part in model.modules() if isinstance(part, SandwichBlock)])
    tokens, random = torch.randint(30, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0)), SampleRandom(0, range(4), CPU, 0)
    objective(model, tokens, random).value.backward()
    with torch.no_grad():
        assert objective.held_out_nll(model, tokens, random).isfinite().all()
