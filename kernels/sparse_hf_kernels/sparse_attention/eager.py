"""A call of sparse attention whose arguments are in order: positions, then the backend that dispatch picks."""

from __future__ import annotations

from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.checks import check_positions


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by the backend that dispatch picks."""
    check_positions(q, k, positions, layout)
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        return _no_pairs(q, k, v)
    request = AttentionRequest.of("sparse_attention", q, layout, positions=positions, v=v)
    backend = select_backend(request).backend
    return backend.sparse_attention(q, k, v, layout, positions=positions, scale=scale, deterministic=deterministic)


def _no_pairs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What there is to return without a query or without a key: nothing or rows without key."""
    # The empty sums keep the graph, so that gradients exist and are 0.
    zeros = q[..., :0].sum(-1) + k[..., :0].sum() + v[..., :0].sum()
    return zeros.unsqueeze(-1).expand(*q.shape[:3], v.shape[-1]), zeros.float() + float("-inf")
