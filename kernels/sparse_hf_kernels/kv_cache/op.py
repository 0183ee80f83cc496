"""`store_tokens` and `decode_attention`: what writes to a layer's storage, and what reads it one token at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import BACKEND_VARIABLE, any_registered, gpu_capability
from sparse_hf_kernels.kv_cache.naive import decode_naive, store_naive
from sparse_hf_kernels.kv_cache.storage import KVStorage

if TYPE_CHECKING:
    from sparse_hf_kernels.kv_cache.launch import Workspace

SERVED_BACKENDS = ("gluon", "triton", "sdpa")
"""Names under which the fused kernels decode and store."""

MAX_HEAD_DIM = 256
MAX_ROWS = 4096
"""KV heads times rows of the batch: every program of a decode launch looks at all of them."""


def kernels_refuse(storage: KVStorage, device: torch.device) -> str | None:
    """Why the fused kernels cannot serve a storage; None if they can."""
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced not in (None, "", *SERVED_BACKENDS):
        return f"stand back for {BACKEND_VARIABLE}={forced!r}"
    if any_registered():
        return "stand back for a registered backend"
    if device.type != "cuda" or torch.version.hip is not None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"need an NVIDIA GPU, got device {device.type!r}"
    elif (capability := gpu_capability(device.index)) is None or capability < (8, 0):
        return "need compute capability 8.0 or later"
    elif storage.kv_dtype == "fp8" and capability < (8, 9):
        return "convert 8-bit floats from compute capability 8.9 on"
    if storage.keys.shape[2] != storage.values.shape[2]:
        return "serve values of the keys' head_dim"
    if storage.keys.shape[2] > MAX_HEAD_DIM:
        return f"serve head_dim up to {MAX_HEAD_DIM}, got {storage.keys.shape[2]}"
    rows = storage.batch * len(storage.layout.heads)
    return f"serve up to {MAX_ROWS} KV heads times rows, got {rows}" if rows > MAX_ROWS else None


def store_tokens(
    storage: KVStorage, k: Tensor, v: Tensor, *, seen: int | None = None, positions: Tensor | None = None
) -> None:
    """Stores new tokens and counts them; a ring keeps the last of them.

    Args:
        storage: has room for them.
        k, v: `[batch, num_kv_heads, new, head_dim]`.
        seen: tokens that every row has before them, where all rows have as many and none is padded.
        positions: instead: int64 `[batch, new]`, -1 for padding, else counting on from the row's length.
    """
    assert (seen is None) != (positions is None)
    num_new = k.shape[2]
    if seen is not None and storage.write_run(k, v, seen):
        storage.state.add_(num_new)
        return
    lengths = None
    if positions is not None:
        positions = positions.expand(len(k), -1).contiguous()
        lengths = storage.lengths + (positions >= 0).sum(-1, dtype=torch.int32)
    if num_new and kernels_refuse(storage, k.device) is None:
        from sparse_hf_kernels.kv_cache.launch import store_triton

        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        store_triton(k, v, storage, positions, lengths, seen or 0)
    elif num_new:
        if positions is None:
            assert seen is not None
            positions = torch.arange(seen, seen + num_new, device=k.device).expand(len(k), -1)
        after = storage.lengths + num_new if lengths is None else lengths
        store_naive(storage, k, v, positions, after)
    if lengths is None:
        storage.state.add_(num_new)
    else:
        storage.state[0] += num_new
        storage.state[1:] = lengths


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    storage: KVStorage,
    *,
    scale: float,
    valid: Tensor | None = None,
    work: Workspace | None = None,
) -> tuple[Tensor, Workspace | None]:
    """Attention of one new token per row over itself and what its heads have stored; then stores and counts it.

    One launch serves all heads, however many keys each holds. Nothing is read on the host: a captured CUDA graph goes
    on from token to token. A linear head without room for the token gives NaN.

    Args:
        q: `[batch, num_heads, 1, head_dim]`.
        k, v: `[batch, num_kv_heads, 1, head_dim]`, of the new token.
        storage: changed in place.
        scale: factor on the scores.
        valid: boolean `[batch]`, which rows have a new token; the others give 0 and store nothing.
        work: what the last call on this device returned.

    Returns:
        Output `[batch, 1, num_heads, head_dim]`, as models go on with it, and scratch for the next call.
    """
    if kernels_refuse(storage, q.device) is not None:
        precise = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
        return decode_naive(q, k, v, storage, scale=scale, valid=valid, dtype=precise).transpose(1, 2), None
    from sparse_hf_kernels.kv_cache.launch import decode_fused

    return decode_fused(q, k, v, storage, work, scale, valid)
