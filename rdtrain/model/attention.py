"""Causal attention behind one door: flash-attn where it can run, else PyTorch's scaled_dot_product_attention.

flash-attn is used when it can be imported, the tensors are on CUDA and their dtype is fp16 or bf16. `attention_backend` says which
of the two a run uses, so that nobody has to guess.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def find_flash_attn():
    """flash-attn's kernel, or None. The import names the function: the package flash-attn-4 also answers to `flash_attn`."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


# Looked for once, here: an import inside the layers would cut the compiled model in two at every attention.
FLASH_ATTN = find_flash_attn()


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that `causal_attention` uses for tensors of this device and dtype."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and FLASH_ATTN is not None:
        return "flash-attn"
    return "SDPA"


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in which a query sees its own position and all earlier ones, or those where `mask` is true.

    query is [B, H, Tq, D]; key and value are [B, H, Tk, D] with Tk >= Tq. The queries are the last Tq of the Tk positions, as they
    are when the first Tk - Tq keys come from a cache. mask: bool [1 or B, 1, Tq, Tk], of SDPA alone. Returns [B, H, Tq, D].
    """
    if mask is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    queries, keys = query.shape[2], key.shape[2]
    if attention_backend(query.device, query.dtype) == "flash-attn":
        # flash-attn wants [B, T, H, D] and aligns its causal mask with the last key, as we do.
        out = FLASH_ATTN(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=True)
        return out.transpose(1, 2)
    if queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if queries == 1:
        return F.scaled_dot_product_attention(query, key, value)
    # SDPA aligns `is_causal` with the first key, so a chunk that follows a cache needs its mask written out.
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
