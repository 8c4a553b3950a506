"""Products in fp8, as far as a CPU goes: it rounds to fp8 and multiplies in the dtype that there was. tests/test_gpu.py has real ones."""

import functools
import sys

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.distributed import World
from rdtrain.dry_run import dry_run
from rdtrain.engine.float8 import use_float8
from rdtrain.errors import UserError
from rdtrain.model.noise import NoiseSettings
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.randomness import SampleRandom

E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
"""Bits of the mantissa, exponent of the smallest normal number, largest number (Micikevicius et al. 2022, arXiv 2209.05433, table 1)."""


def rounded(x, kind):
    """x in so many bits, scaled so that its largest number is that of its kind, and the scale taken back; float64."""
    bits, smallest, largest = kind
    scale = largest / x.abs().max().double()
    scaled = x.double() * scale
    step = torch.exp2(scaled.abs().clamp_min(2.0**smallest).log2().floor() - bits)
    return (scaled / step).round() * step / scale


@pytest.fixture
def model():
    torch.manual_seed(0)
    objective = build_objective(ObjectiveSettings(name="diffusion_blocks"), NoiseSettings(), 4, 1)
    layers = dict(prelude_layers=1, core_layers=1, coda_layers=1)
    shape = ModelConfig(width=64, heads=2, mlp_width=96, iterations=4, vocab_size=50, **layers, **objective.model_fields)
    return RecurrentDepthLM(shape), objective


def test_all_three_products_of_a_linear_map_round_what_they_multiply(model):
    model, _ = model
    use_float8(model, emulate=True)
    linear = model.cores[0].layers[0].mlp.gate_value
    x, above = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 192)
    out = linear(x)
    out.backward(above)
    with torch.no_grad():
        rows, grads, weight = rounded(x, E4M3).flatten(0, 1), rounded(above, E5M2).flatten(0, 1), rounded(linear.weight, E4M3)
    for found, expected in ((out, rows @ weight.t()), (x.grad, grads @ weight), (linear.weight.grad, grads.t() @ rows)):
        torch.testing.assert_close(found.detach().double(), expected.view_as(found), rtol=0, atol=2e-6 * float(expected.abs().max()))
        exact = {out: x @ linear.weight.t(), x.grad: above @ linear.weight}.get(found)
        assert exact is None or (found - exact).abs().max() > 1e-3 * exact.abs().max()


def test_the_layers_and_the_adapter_have_them_and_weights_keep_their_names(model):
    model, _ = model
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    use_float8(model, emulate=True)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert found == {"adapter", "query_key_value", "output", "gate_value"}
    assert {type(module).__name__ for module in model.noise_embedding.children()} == {"Linear"}


def test_a_step_is_that_of_bf16_but_for_rounding_traced_or_not(model, monkeypatch):
    model, objective = model
    model.checkpoint_layers("selective")
    tokens = torch.randint(50, (4, 18), generator=torch.Generator().manual_seed(0))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = objective(model, tokens, SampleRandom(0, range(4), torch.device("cpu"), 0)).value
        value.backward()
        return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, plain_gradient = step()
    use_float8(model, emulate=True)
    eager, eager_gradient = step()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # traced whole, which is the question
    objective.compile(model)
    compiled, gradient = step()
    assert 0 < (eager - plain).abs() < 0.01 * plain and (compiled - plain).abs() < 0.01 * plain
    for found in (eager_gradient, gradient):
        assert torch.cosine_similarity(found, plain_gradient, dim=0) > 0.98


def test_what_cannot_have_them_is_refused(tiny_config, monkeypatch):
    path = tiny_config(engine={"name": "torch", "compile": True, "precision": "fp8"})
    cpu, cuda = (World(0, 1, 0, torch.device(name)) for name in ("cpu", "cuda"))
    with pytest.raises(UserError, match="engine.precision=fp8 is for CUDA devices, and this is to run on cpu"):
        dry_run(load_config(path), cpu)
    with pytest.raises(UserError, match="multiples of 16, and model.mlp_width is 40"):
        dry_run(load_config(path, ["model.mlp_width=40"]), cuda)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="engine.precision=fp8 needs torchao"):
        dry_run(load_config(path, ["model.mlp_width=48"]), cuda)
