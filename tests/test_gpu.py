"""What only a CUDA device can show. These tests skip themselves where there is none."""

import json
import math

import pytest
import torch
from torch._inductor.utils import run_fw_bw_and_get_code

from rdtrain.bench.command import BenchSettings, bench
from rdtrain.bench.measure import Effort
from rdtrain.config import load_config
from rdtrain.distributed import World, agree
from rdtrain.engine import EngineSettings, build_engine, start_processes
from rdtrain.model.attention import attention_backend, causal_attention, document_mask
from rdtrain.model.halves import PARTS
from rdtrain.model.layers import GatedMLP
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What the tests before have compiled would count towards the limit of recompilations, which a few models of different kinds reach."""
    torch._dynamo.reset()


@pytest.fixture
def no_waiting():
    """A function after which every wait of the host for the device is an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "mark"), [("diffusion_blocks", None), ("diffusion_blocks", 7), ("bptt", None), ("one_pass", 7)])
def test_a_training_step_does_not_wait_for_the_device(name, mark, no_waiting):
    iterations, world = 1 if name == "one_pass" else 4, World(0, 1, 0, torch.device("cuda", 0))
    objective = build_objective(ObjectiveSettings(name=name), NoiseSettings(), iterations, 1)
    sizes = dict(width=64, heads=2, mlp_width=64, iterations=iterations, vocab_size=50, document_mark=mark)
    model = RecurrentDepthLM(ModelConfig(**sizes, **objective.model_fields))
    engine = build_engine(EngineSettings(name="torch"), model, objective, OptimizerSettings(), 4, 1, world)
    tokens = torch.randint(50, (4, 17), device=world.device)

    def step(number):
        engine.measure_step()  # what is looked at inside of it is read where it is logged
        engine.train_step([(tokens, SampleRandom(0, range(4), world.device, number))], 1e-3)

    for number in range(2):
        step(number)
    no_waiting()
    for number in range(2, 4):
        answer = agree(world, f"step {number}", number, 0)
        step(number)
        assert answer() == 0
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert engine.measurement.pass_seconds() > 0
    found = engine.norms_by_part()
    assert math.hypot(*found["gradient_norm_by_part"].values()) == pytest.approx(engine.gradient_norm(), rel=1e-3)
    assert all(0 < size < 1 for part, size in found["update_size_by_part"].items() if part != "conditioning")


@pytest.mark.parametrize(("name", "mark"), [("diffusion_blocks", None), ("diffusion_blocks", 7), ("bptt", 7), ("one_pass", None)])
def test_compiled_and_checkpointed_losses_stay_within_bf16_noise_of_the_plain_ones_over_200_steps(name, mark):
    iterations, world, losses = 1 if name == "one_pass" else 4, World(0, 1, 0, torch.device("cuda", 0)), []
    tokens = torch.randint(500, (8, 65), generator=torch.Generator().manual_seed(0)).to(world.device)
    for compiled, how in ((False, "none"), (True, "selective")):
        objective = build_objective(ObjectiveSettings(name=name, layer_checkpointing=how), NoiseSettings(), iterations, 1)
        torch.manual_seed(0)
        sizes = dict(width=128, heads=2, mlp_width=256, iterations=iterations, vocab_size=500, document_mark=mark)
        shape = ModelConfig(**sizes, **objective.model_fields)
        settings = EngineSettings(name="torch", compile=compiled)
        engine = build_engine(settings, RecurrentDepthLM(shape), objective, OptimizerSettings(), 8, 1, world)
        found = [engine.train_step([(tokens, SampleRandom(0, range(8), world.device, step))], 1e-3)[0].value for step in range(200)]
        losses.append(torch.stack(found).detach().float().cpu())
    plain, other = losses
    assert plain[-20:].mean() < plain[:20].mean()
    assert (other[:20] - plain[:20]).abs().max() < 0.02 and (other - plain).mean().abs() < 0.02


@pytest.mark.parametrize(("name", "mark", "engine"), [("diffusion_blocks", None, "torch"), ("diffusion_blocks", 7, "torch"),
                                                      ("one_pass", None, "torch"), ("diffusion_blocks", None, "deepspeed")])
def test_passes_in_cuda_graphs_train_as_they_do_without_and_wait_for_nothing(name, mark, engine, no_waiting):
    iterations, world, found = 1 if name == "one_pass" else 4, World(0, 1, 0, torch.device("cuda", 0)), []
    batches = torch.randint(500, (2, 10, 8, 65), generator=torch.Generator().manual_seed(0)).to(world.device)
    for captured in (False, True):
        objective = build_objective(ObjectiveSettings(name=name), NoiseSettings(), iterations, 1)
        torch.manual_seed(0)
        sizes = dict(width=128, heads=2, mlp_width=256, iterations=iterations, vocab_size=500, document_mark=mark)
        shape = ModelConfig(**sizes, **objective.model_fields)
        settings = EngineSettings(name=engine, compile=True, cuda_graph=captured)
        start_processes(settings, world)
        built = build_engine(settings, RecurrentDepthLM(shape), objective, OptimizerSettings(epsilon=1e-4), 8, 2, world)

        steps = []
        for number in range(10):
            if number == 2 and engine == "torch":  # ZeRO reads its norm in every step
                no_waiting()
            samples = [SampleRandom(0, range(first, first + 8), world.device, number) for first in (0, 8)]
            losses = built.train_step(zip(batches[:, number], samples), 1e-3)
            steps += [*(loss.value.detach() for loss in losses), built._norm]
        torch.cuda.set_sync_debug_mode("default")
        found.append(torch.tensor([float(each) for each in steps]))
        with torch.no_grad():  # a longer sequence, with rotary angles of its own, must not change what is replayed
            built.held_out_nll(torch.randint(500, (8, 129), device=world.device), SampleRandom(0, range(8), world.device))
        built.close()
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=0)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_products_in_fp8_train_as_those_in_bf16(engine):
    world, losses = World(0, 1, 0, torch.device("cuda", 0)), []
    tokens = torch.randint(500, (8, 65), generator=torch.Generator().manual_seed(0)).to(world.device)
    for precision in ("bf16", "fp8"):
        objective = build_objective(ObjectiveSettings(layer_checkpointing="selective"), NoiseSettings(), 4, 1)
        torch.manual_seed(0)
        shape = ModelConfig(width=128, heads=2, mlp_width=256, iterations=4, vocab_size=500, **objective.model_fields)
        settings = EngineSettings(name=engine, compile=True, precision=precision)
        start_processes(settings, world)
        built = build_engine(settings, RecurrentDepthLM(shape), objective, OptimizerSettings(), 8, 1, world)
        found = [built.train_step([(tokens, SampleRandom(0, range(8), world.device, step))], 1e-3)[0].value for step in range(100)]
        losses.append(torch.stack(found).detach().float().cpu())
        built.close()
    plain, other = losses
    assert plain[-20:].mean() < plain[:20].mean() and not torch.equal(plain, other)
    assert (other[:20] - plain[:20]).abs().max() < 0.05 and (other - plain).mean().abs() < 0.02


def test_the_gradients_of_gate_and_value_are_written_in_place_in_a_kernel_for_each_part():
    """Three numbers read for two written, by no kernel that chooses between the halves."""
    mlp, x = GatedMLP(128, 1000).to("cuda", torch.bfloat16), torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _, codes = run_fw_bw_and_get_code(lambda: torch.compile(mlp, fullgraph=True, dynamic=False)(x))
    assert codes[-1].count("'num_load': 3, 'num_store': 2") == PARTS and "tl.where" not in codes[-1]


@pytest.mark.parametrize("head_width", [64, 96, 128, 256, 264])
def test_no_head_that_is_trained_goes_through_the_math_kernel(head_width):
    named = attention_backend(torch.device("cuda", 0), torch.bfloat16, head_width, 512)
    assert named in ("flash-attn", "SDPA flash", "SDPA cudnn", "SDPA efficient") and (head_width <= 256 or named == "SDPA efficient")
    assert attention_backend(torch.device("cuda", 0), torch.bfloat16, head_width, 512, masked=True) == "SDPA efficient"


@pytest.mark.parametrize("length", [512, 100])
def test_documents_are_kept_apart_as_in_fp32_and_the_mask_is_kept_once_for_all_layers(length):
    ids = torch.randint(0, 40, (2, length), device="cuda")
    inputs = [torch.randn(2, 4, length, 64, device="cuda", requires_grad=True) for _ in range(3)]
    found, saved = [], set()
    for dtype in (torch.float32, torch.bfloat16):
        mask = document_mask(ids, 0, dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.add(tensor.data_ptr()) or tensor, lambda tensor: tensor):
            out = causal_attention(*(each.to(dtype) for each in inputs), mask)
        found.append([out.float(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert mask.data_ptr() in saved
    for one, other in zip(*found, strict=True):
        assert (other - one).norm() < 0.02 * one.norm()


def test_what_bench_says_of_a_step_fits_together(tmp_path):
    sizes = ["model.width=512", "data.sequence_length=512", "batch.global_sequences=16", "batch.micro_sequences=16", "engine.name=torch"]
    captured = "blocks engine.compile=true engine.cuda_graph=true"
    settings = BenchSettings(
        Effort(3, 5, profile=tmp_path / "traces"), ["blocks", "full model.mlp_width=10000000", "truncated", captured], vocab_size=8192,
        output=tmp_path / "out",
    )
    bench(load_config(None, sizes), settings)
    blocks, none, truncated, captured = json.loads((tmp_path / "out/bench.json").read_text())["measurements"]
    assert "out of memory" in none["out_of_memory"]
    for row in (blocks, truncated):
        memory, n = row["memory"], row["parameters"]
        assert memory["weights"] == memory["gradients"] == 4 * n and memory["host"] == 0
        # cuBLAS keeps some tens of MiB to work in
        assert memory["peak"] == pytest.approx(12 * n + memory["passes"], abs=100 * 2**20) and memory["peak"] <= memory["reserved"]
        assert 0 < row["busy_seconds"] < 1.05 * row["step_seconds"]["typical"] and row["enqueue_seconds"] > 0
        assert row["attention_kernels"] and len(row["kernels"]) == 10 and len(row["files"]) == 2
    assert truncated["memory"]["activations"] > 3 * blocks["memory"]["activations"]
    assert captured["memory"]["peak"] == pytest.approx(captured["estimate"]["peak"], rel=0.1)
    assert captured["enqueue_seconds"] < blocks["enqueue_seconds"]
