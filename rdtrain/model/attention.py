"""Causal attention behind one door: flash-attn where it can run, else PyTorch's scaled_dot_product_attention (SDPA).

flash-attn is used when it can be imported, the tensors are on CUDA, their dtype is fp16 or bf16 and the heads are no wider than it takes.
Where SDPA runs in half precision on CUDA, whole sequences go through the first of KERNELS that can, and in passes with gradient never
through its `math` kernel, which would keep all T x T scores. `attention_backend` says which kernel a run uses, so that nobody has to guess.

Where documents are kept apart (`document_mask`), SDPA's memory-efficient kernel runs, the one that takes a mask; flash-attn does not.

flash-attn-4 (flash_attn.cute) is no backend of its own: its functions are none that torch.compile knows, and SDPA's flash kernel becomes
flash-attn-4's by `torch.nn.attention.activate_flash_attention_impl("FA4")`, from PyTorch 2.10 on. On an H200 cuDNN's is faster with
sequences shorter than 16,384 tokens (docs/results/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDEST_FLASH_HEAD = 256
"""Channels of a head that flash-attn, and SDPA's flash kernel, take at most."""

KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""SDPA's kernels for whole sequences in half precision on CUDA, the first that can run first."""

MASKED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION]
"""The same under a `document_mask`."""


def find_flash_attn():
    """flash-attn's kernel, or None. The import names the function: the package flash-attn-4 also answers to `flash_attn`."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


# Looked for once, here: an import inside the layers would cut the compiled model in two at every attention.
FLASH_ATTN = find_flash_attn()


def half_precision(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors are such as flash kernels take: on CUDA, fp16 or bf16."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def uses_flash_attn(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether `causal_attention` calls flash-attn."""
    return FLASH_ATTN is not None and half_precision(device, dtype) and head_width <= WIDEST_FLASH_HEAD


def refuse_head_width(device: torch.device, dtype: torch.dtype, head_width: int, masked: bool = False) -> None:
    """ValueError for heads that no kernel but the `math` one takes: memory-efficient attention wants multiples of 8, the others at most
    WIDEST_FLASH_HEAD. masked: whether under a `document_mask`. The device need not be there."""
    if half_precision(device, dtype) and masked and head_width % 8:
        raise ValueError(
            f"heads of {head_width} channels are no multiple of 8, as attention that keeps documents apart needs them: choose width and "
            "heads so that they are, or leave document masking off"
        )
    if half_precision(device, dtype) and head_width > WIDEST_FLASH_HEAD and head_width % 8:
        raise ValueError(
            f"heads of {head_width} channels are more than the {WIDEST_FLASH_HEAD} of flash attention and no multiple of 8: choose width "
            "and heads so that they are one or the other"
        )


def attention_backend(device: torch.device, dtype: torch.dtype, head_width: int = 64, length: int = 128, masked: bool = False) -> str:
    """The name of the kernel that `causal_attention` uses for whole sequences of so many positions: `flash-attn`, or `SDPA` and the kernel
    that it chooses, asked with tensors on the device. masked: whether under a `document_mask`."""
    if uses_flash_attn(device, dtype, head_width) and not masked:
        return "flash-attn"
    query = torch.zeros(1, 1, length, head_width, device=device, dtype=dtype, requires_grad=True)
    seen = {"attn_mask": document_mask(torch.zeros(1, length, device=device), 0, dtype)} if masked else {"is_causal": True}
    if not half_precision(device, dtype):
        chosen = SDPBackend(torch._fused_sdp_choice(query, query, query, **seen))
    else:
        with sdpa_kernel(MASKED_KERNELS if masked else KERNELS, set_priority=True):
            chosen = SDPBackend(torch._fused_sdp_choice(query, query, query, **seen))
    return f"SDPA {chosen.name.removesuffix('_ATTENTION').lower()}"


def document_mask(ids: Tensor, mark: int, dtype: torch.dtype) -> Tensor:
    """What keeps documents apart: 0 where a position may look, at itself and earlier ones of its own document, and -inf elsewhere.

    ids [B, T]; a document begins at each `mark`, and what stands before the first one is a document as well. Returns [B, 1, T, T] of the
    queries' dtype, which is added to their scores as it is: of a bool mask SDPA would make such a one in each layer, and keep them all.
    """
    documents = (ids == mark).cumsum(1)
    return additive_mask((documents.unsqueeze(1) == documents.unsqueeze(2)).tril().unsqueeze(1), dtype)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, bool [..., Tk], is true, and -inf elsewhere."""
    length = seen.shape[-1]
    aligned = -(-length // 16) * 16  # the memory-efficient kernel's layout: rows of another would be copied in each layer, and kept
    return torch.zeros(*seen.shape[:-1], aligned, dtype=dtype, device=seen.device)[..., :length].masked_fill_(~seen, float("-inf"))


def attend_from_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`causal_attention` of one query position, in fp32, for compiled code, which makes two kernels of it and never writes the products.

    The three sums over keys run over channels alike, weights being the same for all of these, so that one kernel takes them together.
    """
    scores = (query.float() * key.float()).sum(-1) * query.shape[-1] ** -0.5  # [B, H, Tk]
    if mask is not None:
        seen = mask.squeeze(-2)
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    scores = scores.unsqueeze(-1).expand(value.shape)
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    return ((weights * value.float()).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True)).to(query.dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in which a query sees its own position and all earlier ones, or those where `mask` is true.

    query is [B, H, Tq, D]; key and value are [B, H, Tk, D] with Tk >= Tq. The queries are the last Tq of the Tk positions, as they
    are when the first Tk - Tq keys come from a cache. mask: bool [1 or B, 1, Tq, Tk], or an `additive_mask` of that, of SDPA alone.
    Returns [B, H, Tq, D].
    """
    if mask is not None and mask.dtype != torch.bool and half_precision(query.device, query.dtype):
        with sdpa_kernel(MASKED_KERNELS if torch.is_grad_enabled() else [*MASKED_KERNELS, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if mask is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    queries, keys = query.shape[2], key.shape[2]
    if uses_flash_attn(query.device, query.dtype, query.shape[3]):
        # flash-attn wants [B, T, H, D] and aligns its causal mask with the last key, as we do.
        out = FLASH_ATTN(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=True)
        return out.transpose(1, 2)
    if queries == keys and half_precision(query.device, query.dtype):
        with sdpa_kernel(KERNELS if torch.is_grad_enabled() else [*KERNELS, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if queries == 1:
        return F.scaled_dot_product_attention(query, key, value)
    # SDPA aligns `is_causal` with the first key, so a chunk that follows a cache needs its mask written out.
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
