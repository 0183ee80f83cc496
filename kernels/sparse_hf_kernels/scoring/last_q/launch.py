"""Launches of the kernels for the last queries' sums."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.scoring.backend import Launch
from sparse_hf_kernels.scoring.geometry import require_contiguous_rows
from sparse_hf_kernels.scoring.last_q.kernels import _last_q_sums_kernel, _row_lse_kernel

TILES_PER_SPAN = 16


def last_q_tiles(num_rows: int, dim: int, element_size: int) -> dict[str, int]:
    """Padded rows R, keys per tile BN (never fewer, see the kernel), head_dim per step BK, warps and stages.

    The same for every architecture: at most 98,304 bytes of shared memory and no spills.
    """
    rows = max(16, triton.next_power_of_2(num_rows))
    keys = max(rows, 128 if element_size <= 2 and dim <= 128 else 64)
    wide = max(16, triton.next_power_of_2(dim))
    step = (wide if dim <= 128 else 64) if element_size <= 2 else 16
    return {"R": rows, "BN": keys, "BK": step, "num_warps": 8 if rows * keys > 64 * 64 else 4, "num_stages": 2}


def last_q_arguments(
    q: Tensor, k: Tensor, lse: Tensor, vertical: Tensor, slash: Tensor, position: int, scale: float
) -> tuple[Launch, Launch]:
    """Of `_row_lse_kernel` and `_last_q_sums_kernel`; `lse [B * Hq, parts, R]`, `slash [2, B, Hq, kv_len]` zeroed."""
    batch, heads, num_rows, dim = q.shape
    kv_len, parts = k.shape[2], lse.shape[1]
    tiles = last_q_tiles(num_rows, dim, q.element_size())
    log2_scale = scale * math.log2(math.e)
    group = heads // k.shape[1]
    strides = (*q.stride()[:3], *k.stride()[:3])
    options = {"D": dim, **tiles}
    span = tiles["BN"] * TILES_PER_SPAN
    rows = (q, k, lse, log2_scale, num_rows, position, kv_len, span, heads, group, *strides)
    sums = (
        q, k, lse, vertical, slash, log2_scale, num_rows, position, kv_len, heads, group, parts,
        *strides, slash.stride(0),
    )  # fmt: skip
    combine = {**options, "BP": min(16, triton.next_power_of_2(parts))}
    pairs = batch * heads
    return ((parts, pairs), rows, options), ((triton.cdiv(kv_len, tiles["BN"]), pairs), sums, combine)


def last_q_sums_triton(q: Tensor, k: Tensor, position: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `last_q_sums`; `q` holds the last rows alone, the first of them at `position`."""
    require_contiguous_rows(q=q, k=k)
    batch, heads, num_rows, dim = q.shape
    kv_len = k.shape[2]
    tiles = last_q_tiles(num_rows, dim, q.element_size())
    parts = triton.cdiv(kv_len, tiles["BN"] * TILES_PER_SPAN)
    lse = torch.empty(batch * heads, parts, tiles["R"], device=q.device, dtype=torch.float32)
    vertical = torch.empty(batch, heads, kv_len, device=q.device, dtype=torch.float32)
    slash = torch.zeros(2, batch, heads, kv_len, device=q.device, dtype=torch.float32)
    rows, sums = last_q_arguments(q, k, lse, vertical, slash, position, scale)
    for kernel, (grid, arguments, options) in ((_row_lse_kernel, rows), (_last_q_sums_kernel, sums)):
        kernel[grid](*arguments, **options)
    return vertical, slash[0].add_(slash[1])
