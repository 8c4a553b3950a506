"""Passes in CUDA graphs, as far as a CPU goes: what stands for a graph here runs the pass anew, into the tensors a graph would write to.

tests/test_gpu.py holds real ones to plain passes.
"""

import pytest
import torch
from torch import nn

from rdtrain.objectives.cuda_graph import CapturedPass, aliased, trained


class Pretended(CapturedPass):
    """Its forward and its backward pass write to the same tensors in every replay, as those of graphs do."""

    def _capture(self, model, tensors):
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        self.parameters = list(model.parameters())
        self._places = [parameter.data_ptr() for parameter in self.parameters]
        self.seed, self.value, self.losses = torch.ones(()), torch.empty(()), torch.empty(len(tensors[0]))
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters]
        self.forward_graph = self.backward_graph = self
        self._graph = None

    def replay(self):
        with torch.enable_grad():
            if self._graph is None:
                self._graph, losses = self._training_pass(self._model, *self._inputs)
                self.value.copy_(self._graph.detach())
                self.losses.copy_(losses)
            else:
                for kept, gradient in zip(self.gradients, torch.autograd.grad(self._graph, self.parameters, self.seed), strict=True):
                    kept.copy_(gradient)
                self._graph = None


def squares(model, x):
    losses = model(x).squeeze(-1).square()
    return losses.mean(), losses.detach()


@pytest.fixture
def captured():
    torch.manual_seed(0)
    found = Pretended(squares)
    found._model = nn.Linear(3, 1)
    return found


def test_micro_batches_add_up_and_each_result_is_kept(captured):
    model, batches = captured._model, torch.randn(3, 4, 3)
    kept = []
    for batch in batches:
        value, losses = captured(model, batch)
        (value / 3).backward()
        kept.append((value, losses))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for batch, (value, losses) in zip(batches, kept, strict=True):
        plain, each = squares(model, batch)
        (plain / 3).backward()
        assert torch.equal(value, plain) and torch.equal(losses, each) and not losses.requires_grad
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_what_a_graph_cannot_repeat_is_an_error(captured):
    model = captured._model
    captured(model, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match=r"takes tensors of shape \(4, 3\), and one has \(1, 3\)"):
        captured(model, torch.ones(1, 3))
    with torch.no_grad():
        assert captured(model, torch.ones(1, 3))[1].shape == (1,)  # nothing is replayed without gradient
    model.weight.data = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="a parameter has moved in memory"):
        captured(model, torch.ones(4, 3))


def test_a_capture_differentiates_by_aliases_that_nobody_has_hooked_into(build_model):
    model = build_model(False)
    model.final_norm.weight.requires_grad_(False)
    ids, parameters = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0)), trained(model)

    def passed():
        return model.readout(model.prelude(ids)).logsumexp(-1).mean()

    expected = torch.autograd.grad(passed(), parameters, allow_unused=True)
    nodes = [parameter.expand_as(parameter).grad_fn.next_functions[0][0] for parameter in parameters]  # as DeepSpeed does
    for parameter in parameters:
        parameter.register_hook(lambda gradient: pytest.fail("the gradient of a parameter itself was asked for"))
    with aliased(model) as aliases:
        assert [alias.data_ptr() for alias in aliases] == [parameter.data_ptr() for parameter in parameters]
        value, met = passed(), set()
        waiting = [value.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in met:
                met.add(node)
                waiting += [following for following, _ in node.next_functions]
        assert met.isdisjoint(nodes)
        found = torch.autograd.grad(value, aliases, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    with pytest.raises(RuntimeError, match="cut off"), aliased(model):
        raise RuntimeError("cut off")
    assert all(one is other for one, other in zip(trained(model), parameters, strict=True))
