"""Short dense calls by PyTorch's own attention, whose launch takes less time on the host than that of our kernels."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.dispatch import (
    BACKEND_VARIABLE,
    AttentionRequest,
    any_registered,
    dense_len,
    gpu_capability,
    select_backend,
)
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions

NAME = "sdpa"

BREAK_EVEN = {(9, 0): {64: 4096, 128: 3584}}
"""Per compute capability and head_dim: from this many tokens on our kernels take less time, in bf16 and fp16."""

BREAK_EVEN_HEADS = 32
"""Query heads times batch rows that `BREAK_EVEN` is measured with. The time on the device goes with their number and
the square of the length, the time on the host with neither: more of them break even at shorter lengths."""


def sdpa_refuses(request: AttentionRequest) -> str | None:
    """Why `scaled_dot_product_attention` cannot serve a request; None if it can."""
    if request.op != "sparse_attention":
        return f"has no {request.op}"
    if request.dense_len is None:
        longest = _break_even(request)
        shorter = "" if longest is None else f" shorter than {longest} tokens"
        return f"serves whole unpadded sequences{shorter} of which all heads read every earlier token"
    if request.value_dim not in (None, request.head_dim):
        return f"serves values of the keys' head_dim {request.head_dim}, got {request.value_dim}"
    if request.needs_lse:
        return "returns no log-sum-exp"
    return "adds gradients in no fixed order" if request.deterministic else None


def sdpa_defers(request: AttentionRequest) -> str | None:
    """Why other backends should take a request that SDPA could serve; None below the break-even length."""
    longest = _break_even(request)
    if longest is None:
        return "no break-even length is measured for this device, dtype and head_dim"
    if request.dense_len is None or request.num_rows * request.dense_len**2 >= BREAK_EVEN_HEADS * longest**2:
        return f"takes dense calls shorter than {longest} tokens (times {BREAK_EVEN_HEADS} query heads and batch rows)"
    return None


def _break_even(request: AttentionRequest) -> int | None:
    if request.device_type != "cuda" or request.dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = request.capability or gpu_capability()
    return None if capability is None else BREAK_EVEN.get(capability, {}).get(request.head_dim)


def takes_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions | None,
    q_offset: int | None,
    deterministic: bool,
) -> bool:
    """Whether dispatch gives a call that needs no log-sum-exp to SDPA.

    Asked first, since what comes before a backend otherwise (positions, their checks, the request) would take most of
    the time that SDPA saves.
    """
    if deterministic or q_offset or dense_len(q.shape[2], k.shape[2], layout, positions) is None:
        return False
    if v.shape[3] != q.shape[3] or any_registered():
        return False
    return _is_chosen(q.shape, q.dtype, q.device, os.environ.get(BACKEND_VARIABLE))


@lru_cache(maxsize=1024)
def _is_chosen(shape: torch.Size, dtype: torch.dtype, device: torch.device, forced: str | None) -> bool:
    """What `select_backend` says to a dense call of whole sequences; `forced` is what it reads from the environment."""
    request = AttentionRequest(
        op="sparse_attention",
        device_type=device.type,
        dtype=dtype,
        head_dim=shape[3],
        capability=gpu_capability(device.index) if device.type == "cuda" else None,
        num_rows=shape[0] * shape[1],
        dense_len=shape[2],
        needs_lse=False,
    )
    return select_backend(request).backend.name == NAME


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention `[batch, num_heads, length, head_dim]` over whole sequences, differentiable.

    Args:
        q: `[batch, num_heads, length, head_dim]`.
        k, v: `[batch, num_kv_heads, length, head_dim]`, same dtype and device.
        scale: factor on the scores.
    """
    if torch.is_autocast_enabled(q.device.type):
        # Autocast would give the output its own dtype instead of q's.
        with torch.autocast(q.device.type, enabled=False):
            return _sdpa(q, k, v, scale)
    return _sdpa(q, k, v, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    # Without a dense last dimension SDPA would form the N x N scores.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, None]:
    """`Backend.sparse_attention` of what `sdpa_refuses` lets through."""
    return sdpa(q, k, v, scale), None
