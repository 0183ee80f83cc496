"""Vertical and slash sums: how MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766) find their columns."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.backend import BackendName, resolve_backend
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.scoring.last_q.naive import last_q_sums_naive

MAX_LAST_Q = 128


@torch.no_grad()
def last_q_sums(
    q: Tensor,
    k: Tensor,
    *,
    last_q: int = 64,
    scale: float | None = None,
    q_offset: int | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention weights of the last queries, summed over columns and over diagonals.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`, of which the last `min(last_q, q_len)` rows are read.
        k: `[batch, num_kv_heads, kv_len, head_dim]`, same dtype.
        last_q: 1 to 128. MInference takes 64, FlexPrefill its block size.
        scale: by default `head_dim ** -0.5`.
        q_offset: position of the first query, by default `kv_len - q_len`.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        `vertical` and `slash`, fp32 `[batch, num_heads, kv_len]`: the sum over those rows of the causal softmax
        weight at key j, and at distance i - j. Either sums to the number of rows. Gives no gradient; the same bits on
        every call.
    """
    if not 1 <= last_q <= MAX_LAST_Q:
        raise ValueError(f"last_q must lie in [1, {MAX_LAST_Q}], got {last_q}")
    grid = BlockGrid.of(q, k, 1, q_offset)
    rows = min(last_q, grid.q_len)
    q = q[:, :, grid.q_len - rows :]
    position = grid.q_offset + grid.q_len - rows
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if resolve_backend(backend, q.device) == "naive":
        return last_q_sums_naive(q, k, position, scale)
    from sparse_hf_kernels.scoring.last_q.launch import last_q_sums_triton

    return last_q_sums_triton(q, k, position, scale)
