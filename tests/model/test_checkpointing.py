"""Layer checkpointing: the same gradients to the bit, and what is computed again, counted by torch's dispatcher."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rdtrain.engine.block_parallel_engine import Elsewhere
from rdtrain.model.checkpointing import checkpointed
from rdtrain.model.noise import NoiseSettings
from rdtrain.objectives import ObjectiveSettings, build_objective
from rdtrain.randomness import SampleRandom

PRODUCTS = ("mm", "_scaled_dot_product_flash_attention_for_cpu")
CASES = {
    "diffusion_blocks": {"core_readout": True, "self_conditioning": True},
    "bptt": {"depth": "fixed", "trained_iterations": 3},
    "bptt, checkpointed": {"depth": "fixed", "trained_iterations": 3, "activation_checkpointing": True},
    "one_pass": {},
}


class Operations(TorchDispatchMode):
    """Counts the operations that are run, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def gradients(case, how, interval, build_model, autocast):
    """Loss, gradients and counted operations of a training pass, of layers in 1/2/1."""
    settings = ObjectiveSettings(case.split(",")[0], **CASES[case], layer_checkpointing=how, layer_checkpointing_interval=interval)
    objective = build_objective(settings, NoiseSettings(), 1 if case == "one_pass" else 5)
    model = build_model(**objective.model_fields)
    model.checkpoint_layers(objective.layer_checkpointing, objective.layer_checkpointing_interval)
    with torch.autocast("cpu", torch.bfloat16, autocast), Operations() as operations:
        tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0))
        loss = objective(model, tokens, SampleRandom(0, range(4), torch.device("cpu"), 0)).value
    with operations:
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, operations.counts


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_same_to_the_bit_and_selective_repeats_no_product(case, autocast, build_model):
    loss, expected, plain = gradients(case, "none", 1, build_model, autocast)
    for how, interval in (("full", 3),) if "activation_checkpointing" in CASES[case] else (("selective", 1), ("full", 1), ("full", 3)):
        found, actual, counts = gradients(case, how, interval, build_model, autocast)
        assert torch.equal(found, loss)
        for name, gradient in expected.items():
            assert torch.equal(actual[name], gradient), name
        more = {name: counts[name] - plain[name] for name in PRODUCTS}
        assert counts["silu"] > plain["silu"] > 0 and all((count > 0) == (how == "full") for count in more.values()), (how, more)


def test_every_nth_layer_is_counted_through_all_parts_and_in_each_block_alike(build_model):
    model = build_model(prelude_layers=1, core_layers=4, coda_layers=2, blocks=4)
    model.cores[1] = model.cores[2] = Elsewhere()
    parts = [model.prelude_layers, model.cores[0].layers, model.cores[3].layers, model.coda_layers]
    for how, interval, expected in (
        ("full", 3, ["1", "0010", "0010", "01"]), ("selective", 2, ["1", "0101", "0101", "01"]), ("full", 8, ["1", "0000", "0000", "00"]),
        ("full", 1, ["1", "1111", "1111", "11"]), ("none", 1, ["0", "0000", "0000", "00"]),
    ):
        model.checkpoint_layers(how, interval)
        assert {layer.checkpointing for part in parts for layer in part} <= {"none", how}
        assert ["".join(str(int(layer.checkpointing != "none")) for layer in part) for part in parts] == expected


def test_a_product_that_is_changed_in_place_is_computed_again():
    x, weight = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()

    def layer(x, weight):
        return (torch.ops.aten._unsafe_view(x @ weight.t(), (4, 4)).add_(1).sin() @ weight).exp()

    plain, again = (torch.autograd.grad(out.sum(), (x, weight)) for out in (layer(x, weight), checkpointed("selective", layer, x, weight)))
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


def test_compiled_layers_keep_the_products_alone_and_no_casts_of_weights(build_model):
    """The compiler's partition into forward and backward pass, without the compiler; of the prelude, whose layers have no noise level."""
    ids, kept, saved = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0)), [], {}

    def gradients_of(model):
        with torch.autocast("cpu", torch.bfloat16):
            e = model.prelude(ids)
        return torch.autograd.grad(e.float().square().sum(), list(model.prelude_layers.parameters()))

    for layers, interval in ((1, 1), (2, 1), (2, 2)):
        model = build_model(prelude_layers=layers)
        expected, own = gradients_of(model), {parameter.data_ptr() for parameter in model.parameters()}
        model.checkpoint_layers("selective", interval)
        torch._dynamo.reset()
        model._prelude = torch.compile(model._prelude, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor):
            actual = gradients_of(model)
        kept.append(sum(tensor.nbytes for address, tensor in saved.items() if address not in own))
        for one, other in zip(actual, expected, strict=True):
            assert (one - other).norm() < 0.02 * other.norm()
    width, mlp_width, heads = 32, 48, 4
    assert (kept[1] - kept[0]) / ids.numel() == 2 * (7 * width + 2 * mlp_width) + 4 * heads and kept[2] > kept[1]
    torch._dynamo.reset()
