"""Launches of the pooling kernels."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.scoring.backend import Launch
from sparse_hf_kernels.scoring.geometry import BlockGrid, require_contiguous_rows
from sparse_hf_kernels.scoring.pooled.kernels import _mean_pool_kernel, _pooled_scores_kernel

SCORE_TILE = {"BM": 32, "BN": 64, "BK": 32}
"""For every architecture and head_dim. 32 rows are too few for WGMMA, whose operands in registers ptxas before 13.3 may
overwrite; splitting fp32 into TF32 parts would put them there."""


def pool_arguments(x: Tensor, out: Tensor, block_size: int, offset: int) -> Launch:
    """Of `_mean_pool_kernel`, to the contiguous `out [B, H, blocks, D]`."""
    batch, heads, length, dim = x.shape
    options = {"BLOCK_SIZE": block_size, "D": dim, "BR": 16, "BD": triton.next_power_of_2(dim), "num_warps": 4}
    return (out.shape[2], batch * heads), (x, out, length, offset, heads, *x.stride()[:3]), options


def mean_pool_triton(x: Tensor, block_size: int, offset: int) -> Tensor:
    """See `mean_pool`."""
    require_contiguous_rows(x=x)
    batch, heads, length, dim = x.shape
    num_blocks = -(-(offset + length) // block_size) - offset // block_size
    out = torch.empty(batch, heads, num_blocks, dim, device=x.device, dtype=torch.float32)
    grid, arguments, options = pool_arguments(x, out, block_size, offset)
    _mean_pool_kernel[grid](*arguments, **options)
    return out


def scores_arguments(q_mean: Tensor, k_mean: Tensor, out: Tensor, first_block: int, scale: float) -> Launch:
    """Of `_pooled_scores_kernel`, all tensors contiguous."""
    batch, heads, num_rows, dim = q_mean.shape
    arguments = (
        q_mean, k_mean, out, scale * math.log2(math.e), num_rows, k_mean.shape[2], first_block,
        heads // k_mean.shape[1],
    )  # fmt: skip
    options = {"D": dim, **SCORE_TILE, "num_warps": 4, "num_stages": 2}
    return (triton.cdiv(num_rows, SCORE_TILE["BM"]), batch * heads), arguments, options


def pooled_scores_triton(q_mean: Tensor, k_mean: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    """See `pooled_block_scores`; takes the pooled `[B, Hq, nq, D]` and `[B, Hkv, nk, D]`, contiguous."""
    out = torch.empty(*q_mean.shape[:3], k_mean.shape[2], device=q_mean.device, dtype=torch.float32)
    programs, arguments, options = scores_arguments(q_mean, k_mean, out, grid.first_block, scale)
    _pooled_scores_kernel[programs](*arguments, **options)
    return out
