"""The public sparse attention operator: checks, then the backend that dispatch picks."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.checks import (
    check_inputs,
    checked_deterministic,
    checked_scale,
    packed_positions,
)
from sparse_hf_kernels.sparse_attention.custom_ops import traced_attention
from sparse_hf_kernels.sparse_attention.dense_rows import attend_by_rows
from sparse_hf_kernels.sparse_attention.sdpa import sdpa, takes_at_once
from sparse_hf_kernels.sparse_attention.traced import TracedPositions


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions | TracedPositions | None = ...,
    cu_seqlens: Tensor | None = ...,
    q_offset: int | None = ...,
    selection: BlockSelection | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool | None = ...,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions | TracedPositions | None = ...,
    cu_seqlens: Tensor | None = ...,
    q_offset: int | None = ...,
    selection: BlockSelection | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    deterministic: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions | TracedPositions | None = None,
    cu_seqlens: Tensor | None = None,
    q_offset: int | None = None,
    selection: BlockSelection | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys that each head's pattern keeps; differentiable in q, k and v.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`, fp32, bf16 or fp16.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`, same dtype and device. Grouped-query heads are not repeated.
        layout: one pattern per KV head.
        positions: where the tokens stand; by default the queries are the last `q_len` of `kv_len` unpadded tokens.
        cu_seqlens: integer `[num_sequences + 1]`, instead of positions: the borders of sequences packed into one row.
        q_offset: instead of positions: where the first query stands among unpadded keys.
        selection: the blocks and columns that the heads of selected patterns read; needs one unpadded sequence per row.
        scale: positive factor on the scores, by default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp.
        deterministic: the gradients have the same bits in every run; by default what
            `torch.use_deterministic_algorithms` says.

    Returns:
        Output `[batch, num_heads, q_len, head_dim]`; with `return_lse` also the natural log-sum-exp
        `[batch, num_heads, q_len]` in fp32. A query without any key gives 0 and -inf.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, a sequence longer than a block list, or
            more than one of positions, cu_seqlens and q_offset.
    """
    if (positions is not None) + (cu_seqlens is not None) + (q_offset is not None) > 1:
        raise ValueError("give at most one of positions, cu_seqlens and q_offset: each says where the tokens stand")
    scale, deterministic = checked_scale(scale, q.shape[-1]), checked_deterministic(deterministic)
    if cu_seqlens is not None:
        positions = packed_positions(q, k, cu_seqlens)
    lse: Tensor | None
    if torch.compiler.is_compiling():
        if selection is not None:
            raise ValueError("selections are made from q and k in each call and cannot be traced; compile around them")
        out, lse = traced_attention(q, k, v, layout, positions, q_offset, scale, deterministic)
    else:
        assert not isinstance(positions, TracedPositions), "a traced graph's positions exist only within it"
        check_inputs(q, k, v, layout)
        if not return_lse and selection is None and takes_at_once(q, k, v, layout, positions, q_offset, deterministic):
            return sdpa(q, k, v, scale)
        if positions is None:
            positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device, q_offset=q_offset)
        out, lse = attend_by_rows(q, k, v, layout, positions, scale, deterministic, selection, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
