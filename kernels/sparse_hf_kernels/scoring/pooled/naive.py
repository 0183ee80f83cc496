"""Mean pooling and block scores in plain torch, fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.geometry import BlockGrid


def mean_pool_naive(x: Tensor, block_size: int, offset: int) -> Tensor:
    """See `mean_pool`."""
    length = x.shape[2]
    blocks = torch.arange(offset, offset + length, device=x.device) // block_size - offset // block_size
    num_blocks = -(-(offset + length) // block_size) - offset // block_size
    sums = torch.zeros(*x.shape[:2], num_blocks, x.shape[3], device=x.device, dtype=torch.float32)
    sums.index_add_(2, blocks, x.float())
    return sums / torch.bincount(blocks, minlength=num_blocks)[:, None]


def pooled_scores_naive(q_mean: Tensor, k_mean: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    """See `pooled_block_scores`; takes the pooled `[B, Hq, nq, D]` and `[B, Hkv, nk, D]`."""
    group = q_mean.shape[1] // k_mean.shape[1]
    logits = q_mean.unflatten(1, (-1, group)) @ k_mean[:, :, None].transpose(-1, -2) * scale
    rows = torch.arange(grid.first_block, grid.first_block + grid.num_q_blocks, device=q_mean.device)[:, None]
    columns = torch.arange(grid.num_kv_blocks, device=q_mean.device)
    return logits.masked_fill(columns > rows, float("-inf")).softmax(-1).flatten(1, 2)
