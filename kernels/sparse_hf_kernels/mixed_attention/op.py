"""The mask-learning operator: a head's output is a blend of its full and its sparse attention."""

from __future__ import annotations

from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.op import check_inputs, check_positions


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    *,
    positions: TokenPositions | None = None,
    scale: float | None = None,
    skip_saturated: bool = False,
) -> Tensor:
    """`gate * attention(full) + (1 - gate) * attention(sparse)` per KV head; differentiable in q, k, v and gate.

    The mixture of PruLong (arXiv 2506.17121, section 3) and DuoAttention (arXiv 2410.10819, equation 1), with both
    branches reading the student's own q, k and v.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`.
        gate: fp32 `[num_kv_heads]` in [0, 1]; 1 is all full.
        full, sparse: the layouts of the two branches.
        positions, scale: as in `sparse_attention`.
        skip_saturated: leave out the branch of weight exactly 0. Such a head then gives its gate no gradient through
            that branch, which is right for gates whose clamp has none there either (hard concrete).

    Returns:
        `[batch, num_heads, q_len, head_dim]` in q's dtype.

    Raises:
        ValueError: for inputs that do not fit together.
    """
    for layout in (full, sparse):
        check_inputs(q, k, v, layout)
    if gate.shape != (k.shape[1],):
        raise ValueError(f"gate must be [{k.shape[1]}], one value per KV head, got {tuple(gate.shape)}")
    if positions is None:
        positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device)
    check_positions(q, k, positions, full, sparse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = select_backend(AttentionRequest.of("mixed_attention", q, sparse)).backend
    return backend.mixed_attention(
        q, k, v, gate, full, sparse, positions=positions, scale=scale, skip_saturated=skip_saturated
    )
