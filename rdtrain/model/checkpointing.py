"""Layers that keep less for the backward pass and compute it again there: everything, or all that is cheap.

Almost all time of a layer goes into its matrix products and attention, and most of its memory into what lies between them: norms, rotated
queries and keys, the activation of the MLP. `selective` keeps the former's outputs and the layer's input, 7 d + 2 m numbers a token for
width d and MLP width m (Korthikanti et al. 2022, arXiv 2205.05198), and `full` the input alone.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LayerCheckpointing = Literal["none", "selective", "full"]

ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# A product with a bias (addmm) is that of the noise level, as cheap as a norm.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default, torch.ops.aten.bmm.default, *ATTENTION]


def every_nth(interval: int, counts: Sequence[int]) -> list[range]:
    """Which layers of parts with so many layers each are checkpointed, from 0 in each part: the first of all, and every interval-th after.

    The backward pass has most to hold where it begins, at the end of the last part. Counted from the front, the chosen layers lie as far
    from there as they can: what they save is saved by then, and what they compute again comes once later layers have let go of theirs.
    """
    chosen, before = [], 0
    for count in counts:
        chosen.append(range(-before % interval, count, interval))
        before += count
    return chosen


def is_product(function) -> bool:
    """Whether an operation's output is kept; flash-attn's is found by name, since the package need not be there."""
    return function in PRODUCTS or function.name() == "flash_attn::_flash_attn_forward"


def storages(tree) -> set[int]:
    """Where the numbers of all tensors in arguments or an output lie."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


class Keep(TorchDispatchMode):
    """Keeps what products return, in order; None for what is changed in place later, as the linear map that DeepSpeed puts in place of
    PyTorch's under ZeRO 3 adds its bias."""

    def __init__(self, kept: list):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.is_mutable:
            changed = storages((args, kwargs))
            self._kept[:] = [None if changed & storages(each) else each for each in self._kept]
        if is_product(function):
            self._kept.append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class Reuse(TorchDispatchMode):
    """Returns what was kept in place of computing it, and lets go of it."""

    def __init__(self, kept: list):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kept = self._kept.pop(0) if is_product(function) else None
        return function(*args, **(kwargs or {})) if kept is None else kept


def keep_products() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a forward pass and of its repetition.

    Those of PyTorch count every operation, and fail where autocast has cast a weight in an earlier iteration, but casts it again here.
    """
    kept = []
    return Keep(kept), Reuse(kept)


def mark(context, function, *args, **kwargs) -> CheckpointPolicy:
    """What a compiler is told of an operation's output."""
    return CheckpointPolicy.MUST_SAVE if is_product(function) else CheckpointPolicy.PREFER_RECOMPUTE


# What compiled code needs: the compiler does not run these contexts, but asks them which outputs to keep.
MARK_PRODUCTS = functools.partial(create_selective_checkpoint_contexts, mark)


def checkpointed(how: LayerCheckpointing, layer: Callable[..., Tensor], *args) -> Tensor:
    """layer(*args), of which the backward pass computes again what `how` does not keep; it must draw no random numbers."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = MARK_PRODUCTS if torch.compiler.is_compiling() else keep_products
    return checkpoint(layer, *args, **options)
