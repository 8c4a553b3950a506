"""Cross-entropy of a linear head, a part of the tokens at a time: the logits of all tokens never stand in memory together.

For each part the logits are made, turned into losses and into the gradients of what went into them, and dropped, as Liger's fused linear
cross-entropy does (Hsu et al. 2024, arXiv 2410.10989). So each token's weight must be known in the forward pass; what the backward pass
brings is one number, by which it multiplies. No product is computed twice, where computing the logits again in the backward pass would cost
a third more of them. PyTorch 2.13 has a function of this kind, which is younger than the oldest PyTorch that we run on and cannot add the
evidence of a noised state.

The gradient of the embedding is summed over parts in fp32, whatever the products are computed in.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_A_TIME = 2**26
"""Tokens times vocabulary of a part at most: 256 MiB of fp32. Larger parts gain little: their products fill a GPU, and what each part costs
beside them, reading and writing the embedding's gradient, is a few percent of the products' time from 1,024 tokens on."""

IGNORED = -100
"""The target of a position that has none, as PyTorch's cross-entropy has it: its loss and its gradients are 0."""


def evidence_logits(evidence: Tensor, table: Tensor, inverse_lengths: Tensor) -> Tensor:
    """The log-likelihood of a noised state under each token, but for what all tokens share: fp32 [..., V].

    evidence: z / sigma^2 [..., d]; table: the embeddings [V, d]; inverse_lengths: one over the length of each, fp32 [V], which makes
    the products those with the unit embeddings. Its size is up to 1 / sigma^2, so what is added to it should be fp32.
    """
    return F.linear(evidence.to(table.dtype), table).float().mul_(inverse_lengths)


def part_gradients(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, evidence: Tensor | None,
                   inverse_lengths: Tensor | None, table_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Losses in nats, fp32 [N], of a part's tokens, and the gradient [N, d] that hidden gets from their sum, each times its weight.

    hidden [N, d] and table [V, d] are of one dtype; targets [N]; weights fp32 [N]. The table's gradient is added to table_gradient,
    fp32 [V, d]. evidence [N, d] and inverse_lengths [V]: as `evidence_logits` takes them, or None.
    """
    targets = targets.unsqueeze(-1)
    product = F.linear(hidden, table)
    # Looked up in the products: compiled code would write all logits in fp32 to look it up there.
    sought, logits = product.gather(-1, targets).float(), product.float()
    del product  # it would be there beside the evidence's
    if evidence is not None:
        seen = F.linear(evidence, table)
        sought += seen.gather(-1, targets).float() * inverse_lengths[targets]
        logits += seen.float().mul_(inverse_lengths)
    largest = logits.amax(-1, keepdim=True)
    probabilities = logits.sub_(largest).exp_()
    total = probabilities.sum(-1, keepdim=True)
    losses = (total.log() - (sought - largest)).squeeze(-1)
    chosen = torch.arange(table.shape[0], device=table.device) == targets
    gradient = probabilities.mul_(1 / total).sub_(chosen.to(torch.uint8)).mul_(weights.unsqueeze(-1)).to(table.dtype)
    table_gradient.add_(gradient.t() @ hidden)
    return losses, gradient @ table


class KnownGradients(torch.autograd.Function):
    """A scalar whose gradients were computed with it."""

    @staticmethod
    def forward(ctx, value: Tensor, hidden: Tensor, table: Tensor, hidden_gradient: Tensor, table_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_gradient, table_gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, table_gradient = ctx.saved_tensors
        return None, above * hidden_gradient, above * table_gradient, None, None


def parts_of(tokens: int, vocabulary: int) -> list[slice]:
    """Slices of so many tokens with LOGITS_AT_A_TIME at most, and one token at least, all of one size where that takes no more than
    twice as many: compiled code is made for one size."""
    fewest = max(1, min(tokens, -(-tokens * vocabulary // LOGITS_AT_A_TIME)))
    count = next((count for count in range(fewest, min(2 * fewest, tokens) + 1) if tokens % count == 0), fewest)
    size = -(-tokens // count)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def linear_cross_entropy(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor | None = None, evidence: Tensor | None = None,
                         inverse_lengths: Tensor | None = None, dtype: torch.dtype | None = None,
                         part: Callable[..., tuple[Tensor, Tensor]] = part_gradients) -> tuple[Tensor, Tensor]:
    """The mean over tokens, ignored ones among them, of weight times cross-entropy, an fp32 scalar to differentiate, and each token's own
    cross-entropy, fp32 and detached.

    hidden [..., d], embedding [V, d], targets [...], of which some may be IGNORED; the logits are hidden @ embedding^T, and the
    `evidence_logits` of evidence [..., d] where that is given, which gets no gradient and gives none to the embedding. weights: fp32, of
    targets' shape, no gradient; None is one for all. dtype: of the products; the embedding's where None. part: `part_gradients`, compiled
    or not.
    """
    dtype, shape = dtype or embedding.dtype, targets.shape
    hidden = hidden.to(dtype).flatten(0, -2)
    with torch.no_grad():
        count = hidden.shape[0]
        table, targets = embedding.detach().to(dtype), targets.flatten()
        counted = targets != IGNORED
        weights, targets = counted.float() if weights is None else weights.flatten() * counted, targets.clamp(min=0)
        evidence = None if evidence is None else evidence.to(dtype).flatten(0, -2)
        known, losses = hidden.detach(), torch.empty(count, device=hidden.device)
        hidden_gradient = torch.empty_like(known)
        table_gradient = torch.zeros(table.shape, device=table.device, dtype=torch.float32)
        for each in parts_of(count, table.shape[0]):
            some = None if evidence is None else evidence[each]
            losses[each], hidden_gradient[each] = part(
                known[each], table, targets[each], weights[each] / count, some, inverse_lengths, table_gradient
            )
        losses *= counted
        value = (losses * weights).mean()
        table_gradient = table_gradient.to(embedding.dtype)
    if torch.is_grad_enabled():
        value = KnownGradients.apply(value, hidden, embedding, hidden_gradient, table_gradient)
    return value, losses.view(shape)
