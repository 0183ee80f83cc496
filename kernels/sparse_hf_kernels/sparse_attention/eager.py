"""A call of sparse attention whose arguments are in order: positions, then the backend that dispatch picks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.checks import check_positions, check_selection


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions,
    scale: float,
    deterministic: bool,
    selection: BlockSelection | None = None,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp, by the backend that dispatch picks; the latter may be None unless it is needed."""
    check_positions(q, k, positions, layout)
    check_selection(q, positions, layout, selection)
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        return _no_pairs(q, k, v)
    request = AttentionRequest.of(
        "sparse_attention",
        q,
        layout,
        positions=positions,
        v=v,
        selection=selection,
        needs_lse=needs_lse,
        deterministic=deterministic,
    )
    backend = select_backend(request).backend
    options: dict[str, Any] = {} if selection is None else {"selection": selection}
    return backend.sparse_attention(
        q, k, v, layout, positions=positions, scale=scale, deterministic=deterministic, **options
    )


def _no_pairs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What there is to return without a query or without a key: nothing or rows without key."""
    # The empty sums keep the graph, so that gradients exist and are 0.
    zeros = q[..., :0].sum(-1) + k[..., :0].sum() + v[..., :0].sum()
    return zeros.unsqueeze(-1).expand(*q.shape[:3], v.shape[-1]), zeros.float() + float("-inf")
