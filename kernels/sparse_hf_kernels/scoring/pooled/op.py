"""FlexPrefill's pooled block scores (arXiv 2502.20766)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.backend import BackendName, resolve_backend
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.scoring.pooled.naive import mean_pool_naive, pooled_scores_naive


@torch.no_grad()
def mean_pool(x: Tensor, block_size: int, *, offset: int = 0, backend: BackendName | None = None) -> Tensor:
    """Mean of the tokens of each block, over those that `x` holds.

    Args:
        x: `[batch, heads, length, dim]`, its first token at position `offset`; block b holds the positions
            [b, b + 1) * block_size, and block 0 of the result is the one that holds `offset`.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        fp32 `[batch, heads, num_blocks, dim]`, contiguous.
    """
    if x.ndim != 4 or x.shape[2] == 0 or offset < 0 or block_size <= 0 or block_size & (block_size - 1):
        raise ValueError(
            f"expected x [batch, heads, length > 0, dim], offset >= 0 and block_size a power of two, "
            f"got shape {tuple(x.shape)}, offset {offset} and block_size {block_size}"
        )
    if resolve_backend(backend, x.device) == "naive":
        return mean_pool_naive(x, block_size, offset)
    from sparse_hf_kernels.scoring.pooled.launch import mean_pool_triton

    return mean_pool_triton(x, block_size, offset)


@torch.no_grad()
def pooled_block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 128,
    scale: float | None = None,
    q_offset: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Block-causal softmax over the scores between mean-pooled query and key blocks.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`; k: `[batch, num_kv_heads, kv_len, head_dim]`, same dtype.
        block_size: a power of two.
        scale: by default `head_dim ** -0.5`.
        q_offset: position of the first query, by default `kv_len - q_len`.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        fp32 `[batch, num_heads, num_q_blocks, num_kv_blocks]`; each row sums to 1 over the blocks up to its own, those
        after it are 0. Gives no gradient.
    """
    grid = BlockGrid.of(q, k, block_size, q_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve_backend(backend, q.device)
    q_mean = mean_pool(q, block_size, offset=grid.q_offset, backend=backend)
    k_mean = mean_pool(k, block_size, backend=backend)
    if backend == "naive":
        return pooled_scores_naive(q_mean, k_mean, grid, scale)
    from sparse_hf_kernels.scoring.pooled.launch import pooled_scores_triton

    return pooled_scores_triton(q_mean, k_mean, grid, scale)
