"""Proves the loss that never has all logits: value and gradients against float64 autograd on the full logits, and what it makes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdtrain.model import linear_cross_entropy as module
from rdtrain.model.linear_cross_entropy import linear_cross_entropy, part_gradients, parts_of

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 16, 24, 70


@pytest.fixture
def small_parts(monkeypatch):
    """Seven tokens at a time, or fewer."""
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", 7 * VOCABULARY)


def operands(scale=1.0):
    """hidden, embedding, targets, weights, evidence, and what multiplies its products."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    embedding = scale * torch.randn(VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    weights = torch.rand(BATCH, LENGTH, generator=generator)
    return hidden, embedding, targets, weights, 3 * torch.randn(BATCH, LENGTH, WIDTH, generator=generator), 1 / embedding.norm(dim=-1)


def by_full_logits(hidden, embedding, targets, weights, evidence):
    """Weighted mean, losses and both gradients of 2.5 times the mean, by float64 autograd."""
    hidden, embedding = (tensor.double().requires_grad_() for tensor in (hidden, embedding))
    logits = hidden @ embedding.T
    if evidence is not None:
        unit = (embedding / embedding.norm(dim=-1, keepdim=True)).detach()
        logits = logits + evidence.double() @ unit.T
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    value = (losses if weights is None else losses * weights).mean()
    return value, losses, *torch.autograd.grad(2.5 * value, (hidden, embedding))


def deviation(actual, expected):
    """The largest difference, relative to the largest element."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "weighted, with_evidence, compiled", [(False, False, False), (True, False, False), (False, True, False), (True, True, True)]
)
def test_value_losses_and_gradients_are_those_of_the_full_logits(weighted, with_evidence, compiled, small_parts):
    hidden, embedding, targets, weights, evidence, lengths = operands()
    weights, evidence = weights if weighted else None, evidence if with_evidence else None
    hidden.requires_grad_(), embedding.requires_grad_()
    function = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else linear_cross_entropy
    value, losses = function(hidden, embedding, targets, weights, evidence, lengths)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    actual = (value, losses, *torch.autograd.grad(2.5 * value, (hidden, embedding)))
    for one, other in zip(actual, by_full_logits(hidden.detach(), embedding.detach(), targets, weights, evidence), strict=True):
        assert deviation(one.detach(), other.detach()) < 1e-6


def test_in_bf16_it_is_as_near_to_the_truth_as_the_full_logits_are(small_parts):
    hidden, embedding, targets, weights, evidence, lengths = operands()
    expected = by_full_logits(hidden, embedding, targets, weights, evidence)
    hidden.requires_grad_(), embedding.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, losses = linear_cross_entropy(hidden, embedding, targets, weights, evidence, lengths, torch.bfloat16)
        logits = F.linear(hidden, embedding).float() + F.linear(evidence, F.normalize(embedding.detach(), dim=-1)).float()
        plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    ours = (losses, *torch.autograd.grad(2.5 * value, (hidden, embedding)))
    full = (plain, *torch.autograd.grad(2.5 * (plain * weights).mean(), (hidden, embedding)))
    assert ours[2].dtype == torch.float32
    for one, other, truth in zip(ours, full, expected[1:], strict=True):
        assert deviation(one.detach(), truth.detach()) < max(1.2 * deviation(other.detach(), truth.detach()), 2**-8)


class Rows(TorchDispatchMode):
    """The most rows of any tensor with a column for each token that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.most = max([self.most, *(leaf.numel() // VOCABULARY for leaf in made if leaf.shape[-1:] == (VOCABULARY,))])
        return out


def test_no_tensor_has_all_logits(build_model, small_parts):
    model = build_model(True, vocab_size=VOCABULARY, posterior_readout=True)
    _, _, targets, _, _, _ = operands()
    state, conditioning = torch.randn(BATCH, LENGTH, 32), model.condition(torch.zeros(BATCH, 1))
    with Rows() as rows:
        value, losses = model.loss(state.requires_grad_(), targets, conditioning, state.detach())
        value.backward()
        embedding = model.read_embedding(state, conditioning, state.detach())
    assert rows.most <= 32 < BATCH * LENGTH, "the 32 rows are those of the transposed embedding"
    logits = model.readout(state, conditioning, None, state.detach())
    torch.testing.assert_close(losses, logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    assert value.item() == pytest.approx(losses.mean().item())
    torch.testing.assert_close(embedding, model.expected_embedding(logits).detach())


def test_targets_are_looked_up_in_the_products():
    """These are written anyway; whatever else they were looked up in, compiled code would write for that: all logits of a part, in fp32."""
    hidden, table, targets, weights, evidence, lengths = operands()
    hidden, table, evidence = hidden.bfloat16().flatten(0, 1), table.bfloat16(), evidence.bfloat16().flatten(0, 1)
    part = make_fx(part_gradients)(hidden, table, targets.flatten(), weights.flatten(), evidence, lengths, torch.zeros(VOCABULARY, WIDTH))
    looked_up_in = [node.args[0].target for node in part.graph.nodes if node.target is torch.ops.aten.gather.default]
    assert looked_up_in == [torch.ops.aten.mm.default] * 2


@pytest.mark.parametrize("tokens, vocabulary", [(1, 50), (48, 70), (53, 70), (16_384, 32_768), (65_536, 8_192), (5, 2**28)])
def test_parts_cover_all_tokens_within_their_size_and_are_alike_where_they_can_be(tokens, vocabulary):
    parts = parts_of(tokens, vocabulary)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(tokens))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) == 1 or max(sizes) * vocabulary <= module.LOGITS_AT_A_TIME
    assert len(parts) <= 2 * max(1, math.ceil(tokens * vocabulary / module.LOGITS_AT_A_TIME)) and len(set(sizes[:-1])) <= 1
    if tokens % 1024 == 0:
        assert len(set(sizes)) == 1
