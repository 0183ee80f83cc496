"""The public sparse attention operator: checks, then the backend that dispatch picks."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over the keys that each head's pattern keeps; differentiable in q, k and v.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`, fp32, bf16 or fp16.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`, same dtype and device. Grouped-query heads are not repeated.
        layout: one pattern per KV head.
        positions: where the tokens stand; by default the queries are the last `q_len` of `kv_len` unpadded tokens.
        scale: factor on the scores, by default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp.

    Returns:
        Output `[batch, num_heads, q_len, head_dim]`; with `return_lse` also the natural log-sum-exp
        `[batch, num_heads, q_len]` in fp32. A query without any key gives 0 and -inf.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, or a sequence longer than a block list.
    """
    check_inputs(q, k, v, layout)
    if positions is None:
        positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device)
    check_positions(q, k, positions, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = select_backend(AttentionRequest.of("sparse_attention", q, layout)).backend
    out, lse = backend.sparse_attention(q, k, v, layout, positions=positions, scale=scale)
    return (out, lse) if return_lse else out


def check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
    """Raises ValueError unless q, k, v and the layout fit together."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be [batch, heads, length, head_dim], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"batch, key length and head_dim must agree, got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be shared out over {k.shape[1]} KV heads")
    if layout.num_kv_heads != k.shape[1]:
        raise ValueError(f"the layout describes {layout.num_kv_heads} KV heads, k has {k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()) or not (q.device == k.device == v.device):
        raise ValueError(
            f"q, k, v must share one floating dtype and one device, got {q.dtype}, {k.dtype}, {v.dtype} "
            f"on {q.device}, {k.device}, {v.device}"
        )


def check_positions(q: Tensor, k: Tensor, positions: TokenPositions, *layouts: AttentionLayout) -> None:
    """Raises ValueError unless the positions have q's and k's lengths, a batch that broadcasts, and block rows."""
    for name, given, length in (
        ("q_positions", positions.q_positions, q.shape[2]),
        ("k_positions", positions.k_positions, k.shape[2]),
    ):
        if given.shape[1] != length or given.shape[0] not in (1, q.shape[0]):
            raise ValueError(f"{name} must be [{q.shape[0]} or 1, {length}], got {tuple(given.shape)}")
    longest = min((p.blocks.max_seq_len for x in layouts for p, _ in x.groups if p.blocks is not None), default=None)
    # Positions, not lengths: packing and padding make the tensors longer than a sequence, eviction shorter.
    if longest is not None and positions.max_seq_len > longest:
        raise ValueError(
            f"the explicit pattern covers {longest} tokens, got a sequence of {positions.max_seq_len}; "
            "give a pattern with more block rows"
        )
