"""What is said of the cost of generation, held to counts that are made otherwise; on the CPU."""

import gc
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rdtrain.bench.generation as bench
from rdtrain.bench.generation import Effort, Settings, measure_generation
from rdtrain.bench.generation_arms import Arm, Subject, compile_layers, shape_of
from rdtrain.bench.generation_report import mean_iterations, page, times_of_reading
from rdtrain.errors import UserError
from rdtrain.flops import generation_flops
from rdtrain.model import compiled as compiled_module
from rdtrain.model.chain import DenoisingChain, UnrolledChain
from rdtrain.model.decoding import Decoder, make_cache
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.sampling import Sampling
from rdtrain.model.text_random import TextRandom

CPU = torch.device("cpu")
NOISE = NoiseSchedule(NoiseSettings())


@pytest.mark.parametrize("changes", [{"noise_conditioning": True}, {"noise_conditioning": True, "posterior_readout": True}, {}])
def test_operations_of_a_token_are_those_that_are_run(build_model, changes):
    """With a cache of 64 columns, all of which a token attends to."""
    model = build_model(core_layers=3, **changes)
    cache, random = make_cache(model, 5, Sampling(), 1, 64, model.embedding.weight), TextRandom(torch.zeros(1, dtype=torch.long))
    denoising = model.config.noise_conditioning
    chain = DenoisingChain(model, NOISE, 5, Sampling(), cache, random) if denoising else UnrolledChain(model, 5, Sampling(), cache, random)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        chain(torch.tensor([[1, 2, 3]]))
        with FlopCounterMode(display=False) as counter:
            chain(torch.tensor([[4]]))
    assert counter.get_total_flops() == generation_flops(model.config, 5, 64)


def test_the_plain_transformer_makes_as_many_operations(build_model):
    blocks = build_model(True, posterior_readout=True, unused_tokens=3).config
    plain, unrolled = (shape_of(kind, blocks, 8, 64) for kind in ("plain", "bptt"))
    layer = 2 * (4 * 32**2 + 3 * 32 * 48) + 4 * 64 * 32
    assert abs(generation_flops(plain, 1, 64) - generation_flops(blocks, 8, 64)) <= layer / 2
    assert plain.iterations == 1 and plain.prelude_layers > 1 + 8 * 3 and not plain.noise_conditioning
    assert (unrolled.iterations, unrolled.core_layers, unrolled.unused_tokens) == (4, 2, 3) and not unrolled.posterior_readout


def test_layers_that_are_compiled_by_themselves_share_their_code(build_model, monkeypatch):
    graphs, outputs = [], []
    monkeypatch.setattr(compiled_module, "_with_sums", lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    compiled_module.compiled_part.cache_clear()
    model = build_model(False, prelude_layers=6)
    try:
        for compiled in (False, True):
            if compiled:
                compile_layers(model)
            decoder = Decoder(model, NOISE, 1, Sampling(), 1, 20)
            outputs.append(torch.stack(list(decoder.generate(torch.tensor([[1, 2, 3]]), 0, 6))))
    finally:
        compiled_module.compiled_part.cache_clear()
    assert torch.equal(*outputs) and len(graphs) == 2  # the prompt, and one position


@pytest.fixture
def settings(tiny_config, tmp_path):
    """One K, two batches, three arms, of a config whose shards nobody needs."""
    (tmp_path / "out").mkdir()
    config = tiny_config(data={"train": "nowhere"})
    arms = ["blocks", "blocks exit=argmax exit_threshold=2", "plain"]
    return Settings([f"{config}:50"], arms, [3], [2, 1], Effort(5, 6, 0.01, 2), tmp_path / "out")


def test_a_case_finds_nothing_of_the_layers_before_it(settings, monkeypatch):
    """Those that are compiled by themselves hold themselves, so that only the garbage collector lets go of them."""
    layers, others = [], []

    def measure(row, arm, model, *_):
        row.token_seconds = row.first_token_seconds = 1.0
        others.extend(one for one in (layer() for layer in layers) if one is not None)
        layers.append(weakref.ref(model.prelude_layers[0]))

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "memory_bandwidth", lambda device: 1.0)
    settings.arms, settings.batches = ["plain compile=true", "bptt"], [1]
    gc.collect()
    gc.disable()  # it may not happen to run in between
    try:
        measure_generation(settings, CPU)
    finally:
        gc.enable()
    assert len(layers) == 2 and not others


def test_cases_are_written_down_as_they_are_made_and_kept(settings, monkeypatch):
    report = measure_generation(settings, CPU)
    assert report == json.loads((settings.output / "generation.json").read_text(), object_hook=_whole_keys) and report["complete"]
    blocks, single, adaptive, _, plain, _ = report["measurements"]
    layer, modulation = 4 * 32**2 + 3 * 32 * 48 + 4 * 32, 129 * 4 * 32
    core, rest, noise = 2 * 32**2 + 2 * layer, layer + 50 * 32 + 32, 3 * modulation + 2 * 128 * 129  # which is known before
    assert blocks["parameters"] == layer + core + rest + noise and blocks["weight_bytes"] == 4 * blocks["parameters"]
    assert blocks["read_bytes"] == 4 * (layer + 3 * (core + rest)) and blocks["layers"] == 1 + 3 * 3
    assert blocks["cache_bytes"] == 2 * single["cache_bytes"] == 2 * 2 * 11 * 32 * 4 * (1 + 3 * 3)
    assert plain["read_bytes"] == plain["weight_bytes"] and plain["cache_bytes"] == 2 * 2 * 11 * 32 * 4 * plain["layers"]
    assert sum(adaptive["iterations_used"].values()) == 2 * 2 * adaptive["tokens"] and 2 <= mean_iterations(adaptive) <= 3
    assert times_of_reading(adaptive, 1.0) is None
    assert times_of_reading(blocks, 3.0 * blocks["weight_bytes"])[0] == pytest.approx(blocks["token_seconds"])
    for row in report["measurements"]:
        assert row["token_seconds"] > 0 and row["first_token_seconds"] > 0 and not row["graph"]
    text = page(report)
    assert "Not complete" not in text and f"| blocks | 2 | {2 / blocks['token_seconds']:,.0f} |" in text

    def fail(*_):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None

    def run_out(*arguments):
        try:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        except RuntimeError:
            fail()

    # Stopped after one case, and told to go on: that one stays, and the others are made, or say why they cannot be.
    cut = report | {"measurements": report["measurements"][:1], "complete": False}
    (settings.output / "generation.json").write_text(json.dumps(cut))
    settings.resume, settings.budget = True, -1.0
    assert measure_generation(settings, CPU)["measurements"] == report["measurements"][:1]
    settings.budget = None
    monkeypatch.setattr(bench, "measure", run_out)
    again = measure_generation(settings, CPU)
    assert again["complete"] and again["measurements"][0] == report["measurements"][0]
    assert all("out of memory" in row["out_of_memory"] for row in again["measurements"][1:]) and "| out of memory |" in page(again)
    monkeypatch.setattr(bench, "measure", fail)
    settings.resume = False
    with pytest.raises(RuntimeError, match="operation failed"):
        measure_generation(settings, CPU)
    settings.resume, settings.effort.new = True, 7
    with pytest.raises(UserError, match="was made on another device or with other options: choose another --output"):
        measure_generation(settings, CPU)


def _whole_keys(tree: dict) -> dict:
    return {int(key) if key.isdigit() else key: value for key, value in tree.items()}


def test_what_cannot_be_measured_is_refused_in_one_sentence(tmp_path, settings):
    for text, words in {
        "teacher": "there is no arm 'teacher': choose from", "blocks wings=2": "arm 'blocks wings=2' cannot be",
        "blocks top_k=x": "cannot be", "bptt solver=ancestral": "leave solver and chain_. to blocks", "blocks graph=x": "cannot be",
        "blocks compile=1": "cannot be", "": "there is no arm ''",
    }.items():
        with pytest.raises(UserError, match=words):
            Arm.parse(text)
    parsed = Arm.parse("blocks graph=false compile=true chain_top_k=8 exit=kl exit_threshold=0.1")
    assert parsed.sampling == Sampling(chain_top_k=8, exit="kl", exit_threshold=0.1) and parsed.compile and not parsed.graph
    for text in ("configs/70m.yaml", "configs/70m.yaml:0"):
        with pytest.raises(UserError, match="is no exported folder: give one, or a config and the tokens"):
            Subject.load(text, CPU)
    with pytest.raises(UserError, match="^--iterations must be at most 65536, and it is 65537: give smaller numbers$"):
        replace(settings, iterations=[1, 65537])
    with pytest.raises(UserError, match="^--seconds must be positive and finite, and it is nan: leave it out for 0.4$"):
        replace(settings, effort=Effort(seconds=math.nan))
    with pytest.raises(UserError, match="^arm 'blocks chain_readout=core' cannot be of .*: chain_readout=core needs a model"):
        measure_generation(replace(settings, arms=["blocks chain_readout=core"]), CPU)
    with pytest.raises(UserError, match="is not a whole exported model"):
        Subject.load(str(tmp_path), CPU)
    with pytest.raises(UserError, match="^--batches must be at least 1"):
        Settings(settings.models, settings.arms, [1], [0], Effort(), tmp_path)
