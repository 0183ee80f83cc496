"""The mask-learning operator: a head's output is a blend of its full and its sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.mixed_attention.checks import check_call
from sparse_hf_kernels.mixed_attention.custom_ops import traced_mixed_attention
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.checks import check_inputs, checked_deterministic, checked_scale
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
        gate: fp32 `[num_kv_heads]` in [0, 1]; 1 is all full. What lies outside gives no meaningful gradients.
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
        return traced_mixed_attention(q, k, v, gate, full, sparse, positions, scale, skip_saturated, deterministic)
    assert not isinstance(positions, TracedPositions), "a traced graph's positions exist only within it"
    if positions is None:
        positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device)
    check_call(q, k, v, positions, full, sparse)
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        # The empty sums keep the graph, so that gradients exist and are 0.
        zeros = q[..., :0].sum(-1) + k[..., :0].sum() + v[..., :0].sum() + gate[:0].sum().to(q.dtype)
        return zeros.unsqueeze(-1).expand(*q.shape[:3], v.shape[-1])
    request = AttentionRequest.of("mixed_attention", q, sparse, positions=positions, v=v, full=full)
    compute = select_backend(request).backend.mixed_attention
    assert compute is not None, "a backend without the operator refuses it"
    return compute(
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
