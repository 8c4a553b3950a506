"""Copies of a module's weights in the dtype of autocast, made once for a pass that calls the module many times over.

torch.autocast casts fp32 weights where products use them and keeps the copies for later uses, but not inside of compiled code: there each
call of the module would cast them anew, and keep copies of its own until its backward pass. Here all calls use the same ones.

How gradients are added up: a product gives its weight's gradient in the dtype of the copies, so each call's is rounded to that. Autograd
would add up the calls' in that dtype, as it does with copies that autocast keeps, and make a rounding error at each call (docs/lab.md has
how large). Here the sum is fp32, to the bit what it is where each call casts for itself, and becomes the weight's gradient without a copy.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

Totals = list[Tensor | None]
"""The sum of each weight's gradients so far in a backward pass."""


class Cast(torch.autograd.Function):
    """Weights -> their copies. The gradients that it gives are the totals: Call gives none, but autograd calls this after every Call."""

    @staticmethod
    def forward(ctx, totals: Totals, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.totals, ctx.dtype = totals, weights[0].dtype
        return tuple(weight.to(dtype) for weight in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *_: None) -> tuple[Tensor | None, ...]:
        gradients = [None if total is None else total.to(ctx.dtype) for total in ctx.totals]
        ctx.totals[:] = [None] * len(gradients)  # autograd takes them over; another backward pass begins at nothing
        return None, None, *gradients


class Call(torch.autograd.Function):
    """Copies -> the same, as one call uses them."""

    @staticmethod
    def forward(ctx, totals: Totals, *copies: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.totals = totals
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[None, ...]:
        for index, gradient in enumerate(gradients):
            total = ctx.totals[index]
            if total is None:  # the first stays as it came, while most activations are there
                ctx.totals[index] = gradient
            elif gradient is not None:
                ctx.totals[index] = total.float().add_(gradient)
        return None, *(None for _ in gradients)


class WeightCopies:
    """Those of the linear maps in a module, which are what autocast casts. For one pass: they do not follow the weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        named = {
            f"{path}.{name}": weight for path, linear in module.named_modules() if isinstance(linear, nn.Linear)
            for name, weight in linear.named_parameters(recurse=False)
        }
        self._module, self._names = module, list(named)
        self._totals: Totals = [None] * len(named)
        self._copies = Cast.apply(self._totals, dtype, *named.values())
        self._detached = [copy.detach() for copy in self._copies]

    def __call__(self, *arguments) -> Tensor:
        """The module's output, with the copies in the place of its weights. Layers of uncompiled code that are checkpointed each by itself
        are computed again after this has returned, from the weights, which autocast casts: the same values."""
        copies = Call.apply(self._totals, *self._copies) if torch.is_grad_enabled() else self._detached
        return functional_call(self._module, dict(zip(self._names, copies)), arguments, tie_weights=False)
