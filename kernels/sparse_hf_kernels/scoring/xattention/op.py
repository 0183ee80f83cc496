"""XAttention's block scores (arXiv 2503.16428)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.backend import BackendName, resolve_backend
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.scoring.xattention.naive import block_mass_naive

STRIDES = (4, 8, 16)
BLOCK_SIZES = (64, 128)


@torch.no_grad()
def xattention_block_mass(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 16,
    block_size: int = 128,
    scale: float | None = None,
    q_offset: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Attention mass of each block, estimated from antidiagonals.

    A tile is `stride` consecutive positions. The logit of query tile i and key tile j <= i is `scale / stride` times
    the sum over r of `q[i * stride + stride - 1 - r] . k[j * stride + r]`; a softmax over the tiles of a row gives its
    weights, and a block's mass is the sum of the weights in it. So a row of blocks sums to the number of its query
    tiles, `block_size / stride` when it is whole. Positions that q or k does not hold count as zero vectors.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`; the strides of the first three dimensions are free.
        k: `[batch, num_kv_heads, kv_len, head_dim]`, same dtype.
        stride: 4, 8 or 16.
        block_size: 64 or 128.
        scale: by default `head_dim ** -0.5`; the paper's division by `stride` comes on top.
        q_offset: position of the first query, by default `kv_len - q_len`. Chunks that begin at a multiple of
            `block_size` give the rows of the whole prefill.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        fp32 `[batch, num_heads, num_q_blocks, num_kv_blocks]`; query block 0 is the one that holds `q_offset`. Blocks
        after the diagonal are 0. Gives no gradient.
    """
    if stride not in STRIDES or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"stride must be one of {STRIDES} and block_size one of {BLOCK_SIZES}, got {stride} and {block_size}"
        )
    grid = BlockGrid.of(q, k, block_size, q_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if resolve_backend(backend, q.device) == "naive":
        return block_mass_naive(q, k, grid, stride, scale)
    from sparse_hf_kernels.scoring.xattention.launch import block_mass_triton

    return block_mass_triton(q, k, grid, stride, scale)
