"""The mask-learning operator: a head's output is a blend of its full and its sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.mixed_attention.composed import blend
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.checks import (
    check_inputs,
    check_positions,
    checked_deterministic,
    checked_scale,
)
from sparse_hf_kernels.sparse_attention.custom_ops import traced_attention
from sparse_hf_kernels.sparse_attention.traced import TracedPositions


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    *,
    positions: TokenPositions | TracedPositions | None = None,
    scale: float | None = None,
    skip_saturated: bool = False,
    deterministic: bool | None = None,
) -> Tensor:
    """`gate * attention(full) + (1 - gate) * attention(sparse)` per KV head; differentiable in q, k, v and gate.

    The mixture of PruLong (arXiv 2506.17121, section 3) and DuoAttention (arXiv 2410.10819, equation 1), with both
    branches reading the student's own q, k and v.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`.
        gate: fp32 `[num_kv_heads]` in [0, 1]; 1 is all full.
        full, sparse: the layouts of the two branches.
        positions, scale, deterministic: as in `sparse_attention`.
        skip_saturated: leave out the branch of weight exactly 0. Such a head then gives its gate no gradient through
            that branch, which is right for gates whose clamp has none there either (hard concrete).

    Returns:
        `[batch, num_heads, q_len, head_dim]` in q's dtype.

    Raises:
        ValueError: for inputs that do not fit together.
    """
    check_inputs(q, k, v)
    if gate.shape != (k.shape[1],):
        raise ValueError(f"gate must be [{k.shape[1]}], one value per KV head, got {tuple(gate.shape)}")
    scale, deterministic = checked_scale(scale, q.shape[-1]), checked_deterministic(deterministic)
    if torch.compiler.is_compiling():
        return _traced(q, k, v, gate, full, sparse, positions, scale, skip_saturated, deterministic)
    assert not isinstance(positions, TracedPositions), "a traced graph's positions exist only within it"
    check_inputs(q, k, v, full, sparse)
    if positions is None:
        positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device)
    check_positions(q, k, positions, full, sparse)
    request = AttentionRequest.of("mixed_attention", q, sparse, positions=positions, v=v, full=full)
    return select_backend(request).backend.mixed_attention(
        q,
        k,
        v,
        gate,
        full,
        sparse,
        positions=positions,
        scale=scale,
        skip_saturated=skip_saturated,
        deterministic=deterministic,
    )


def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    positions: TokenPositions | TracedPositions | None,
    scale: float,
    skip_saturated: bool,
    deterministic: bool,
) -> Tensor:
    """The blend of two operators; which heads they leave out is decided when the graph runs."""
    z = gate.detach()
    branches = (full, z > 0), (sparse, z < 1)
    outs = [
        traced_attention(
            q, k, v, layout, positions, None, scale, deterministic, heads=heads if skip_saturated else None
        )[0]
        for layout, heads in branches
    ]
    return blend(gate, *outs).to(q.dtype)
