"""A core that runs many times over under autocast: one copy of its weights for all iterations, and gradients that are added up in fp32."""

import functools

import pytest
import torch
from torch import nn

from rdtrain.engine.float8 import use_float8
from rdtrain.model.recurrent import Core
from rdtrain.model.weight_copies import WeightCopies
from rdtrain.randomness import SampleRandom

DEPTH, LENGTH, VOCABULARY = 9, 11, 30
NONE, ITERATIONS, SELECTIVE = {}, {"activation_checkpointing": True}, {"layer_checkpointing": "selective"}


@pytest.fixture
def bptt(build_model, fixed_depth, monkeypatch):
    """A factory of a model and BPTT of so many trained iterations; compiled is divided into passes as by the real compiler, but no more,
    and `core_alone` leaves what no iteration runs, and makes the same copies in any case, uncompiled: each part takes seconds."""
    compile_part = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    torch._dynamo.reset()

    def build(trained, compiled, core_alone=False, **settings):
        taken = []

        def compile_some(part, **options):
            if core_alone and not isinstance(getattr(part, "__self__", None), Core):
                return part
            taken.append(part)
            return compile_part(part, **options)

        objective = fixed_depth(DEPTH, trained, **settings)
        model = build_model(width=64, mlp_width=160, core_layers=1, vocab_size=VOCABULARY)
        model.checkpoint_layers(objective.layer_checkpointing)
        if compiled:
            monkeypatch.setattr(torch, "compile", compile_some)
            objective.compile(model)
            assert (len(taken) == 1) == core_alone and taken
        return model, objective

    yield build
    torch._dynamo.reset()


def loss_of(model, objective, keeps=True):
    """keeps: whether autocast keeps its copies of weights for later uses."""
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
        return objective(model, tokens, SampleRandom(0, range(2), torch.device("cpu"), 0)).value


@pytest.mark.parametrize(("trained", "compiled"), [(2, False), (8, False), (8, True), pytest.param(2, True, marks=pytest.mark.slow)])
def test_one_copy_of_each_weight_waits_for_the_backward_pass_however_many_iterations_do(trained, compiled, bptt):
    model, objective = bptt(trained, compiled, core_alone=trained == 8)
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = {shape for weight in linears for shape in (tuple(weight.shape), tuple(reversed(weight.shape)))}
    saved = {}

    def note(tensor):
        if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, objective)
    assert sum(storage.nbytes() for storage in saved.values()) == sum(2 * weight.numel() for weight in linears)


@pytest.mark.parametrize(
    ("settings", "compiled"),
    [
        (NONE, False), (ITERATIONS, False), (SELECTIVE, False), (SELECTIVE, True),
        *(pytest.param(settings, True, marks=pytest.mark.slow) for settings in (NONE, ITERATIONS)),
    ],
)
def test_loss_and_gradients_are_to_the_bit_those_of_a_cast_in_each_iteration(settings, compiled, bptt, monkeypatch):
    """Whose fp32 gradients autograd adds up."""
    found = []
    for each in (True, False):
        model, objective = bptt(3, compiled, core_alone=True, **settings)
        if each:
            monkeypatch.setattr(model, "core_copies", lambda: None)
        loss = loss_of(model, objective, keeps=not each)
        loss.backward()
        found.append({"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()})
    for name, tensor in found[0].items():
        assert tensor.abs().max() > 0 and torch.equal(found[1][name], tensor), name


def test_iterations_with_and_without_gradient_and_evaluation_run_the_same_numbers_cast_once(bptt):
    model, objective = bptt(3, compiled=False)
    seen, names = [], [name for name, _ in model.named_parameters()]
    layer = model.cores[0].layers[0].mlp.gate_value
    layer.register_forward_pre_hook(lambda module, _: seen.append((torch.is_grad_enabled(), module.weight)))
    loss_of(model, objective)
    with torch.no_grad():
        loss = loss_of(model, objective)
    assert loss.isfinite() and [grad for grad, _ in seen] == [False] * (DEPTH - 3) + [True] * 3 + [False] * DEPTH
    for weights in (seen[:DEPTH], seen[DEPTH:]):
        assert {weight.dtype for _, weight in weights} == {torch.bfloat16} and len({weight.data_ptr() for _, weight in weights}) == 1
    assert [name for name, _ in model.named_parameters()] == names and layer.weight.dtype == torch.float32


def test_gradients_of_many_calls_are_added_up_in_fp32_in_each_backward_pass_anew():
    """In bf16 a sum of ones ends at 256."""
    linear = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        copies = WeightCopies(linear, torch.bfloat16)
        total = sum(copies(torch.ones(1, 1)).float() for _ in range(300)).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(total, linear.parameters(), retain_graph=True)
        assert gradient.dtype == torch.float32 and gradient.item() == 300


def test_there_are_none_where_nothing_casts_the_weights(build_model):
    model = build_model()
    assert model.core_copies() is None
    with torch.autocast("cpu", torch.bfloat16):
        assert model.core_copies() is not None and build_model().bfloat16().core_copies() is None
        use_float8(model, emulate=True)
        assert model.core_copies() is None
