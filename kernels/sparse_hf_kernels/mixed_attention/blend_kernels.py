"""What blends two attentions, and what their backward passes start from: one pass over memory each.

`wide` and `sparse` are the two parts of `branches.Branches`. Per row, full attention is `w` parts of `wide` and
`1 - w` parts of `sparse`: w is 1 if `wide` is full attention itself, and the softmax of the two log-sum-exps if
`wide` holds the keys that `sparse` leaves out (DISJOINT). With the gate z of the KV head

    out = z * full + (1 - z) * sparse = z * w * wide + a * sparse,    a = z * (1 - w) + 1 - z.

Backward, with D_x = rowsum(dO * x), the gradient of a score is P_full * z * (dP - D_full) for a key of `wide`, and
P_sparse * (a * dP - z * (1 - w) * D_full - (1 - z) * D_sparse) for one of `sparse`, and its weight for dV is z * P_full
or a * P_sparse. Both are what a plain backward pass computes if it is told another log-sum-exp, `LSE_full - log z` or
`LSE_sparse - log a`, and another delta, D_full or (z * (1 - w) * D_full + (1 - z) * D_sparse) / a.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_hf_kernels.sparse_attention.triton.launch import new_heads, on_device_of

ELEMENTS = 4096
"""Of a tile: three of them are in registers at a time."""


@triton.jit
def _load(ptr, stride_b, stride_h, stride_n, stride_d, b, head, rows, dims, inside):
    """A tile `[BM, BLOCK_D]` in fp32."""
    far = rows.to(tl.int64)[:, None]
    pointers = ptr + b * stride_b + head * stride_h + far * stride_n + dims[None, :] * stride_d
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _shares(wide_lse, sparse_lse, DISJOINT: tl.constexpr):
    """Of full attention, per row: the shares of wide and sparse keys, and the log-sum-exp."""
    if DISJOINT:
        top = tl.maximum(wide_lse, sparse_lse)
        wide = tl.where(wide_lse == float("-inf"), 0.0, tl.exp(wide_lse - top))
        sparse = tl.where(sparse_lse == float("-inf"), 0.0, tl.exp(sparse_lse - top))
        total = tl.where(top == float("-inf"), 1.0, wide + sparse)
        wide, sparse, lse = wide / total, sparse / total, top + tl.log(total)  # total >= 1
    else:
        wide, sparse, lse = tl.zeros_like(wide_lse) + 1.0, tl.zeros_like(wide_lse), wide_lse
    return wide, sparse, lse


@triton.jit
def _weighted_lse(lse, weight):
    """The log-sum-exp that makes a backward pass multiply its weights by `weight`; -inf hides the row from it."""
    # A weight below 0, which no gate asks for, gives NaN.
    some = (weight != 0) & (lse != float("-inf"))
    return tl.where(some, lse - tl.log(tl.where(some, weight, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["q_len"])
def _blend_kernel(
    wide_ptr, sparse_ptr, wide_lse_ptr, sparse_lse_ptr, gate_ptr, out_ptr,
    stride_wb, stride_wh, stride_wn, stride_wd, stride_sb, stride_sh, stride_sn, stride_sd,
    stride_ob, stride_oh, stride_on, stride_od, num_heads, group, q_len,
    DISJOINT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, batch * heads). The log-sum-exps are contiguous `[batch, heads, q_len]`."""
    pair = tl.program_id(1).to(tl.int64)
    b = pair // num_heads
    head = pair % num_heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    wide_lse = tl.load(wide_lse_ptr + pair * q_len + rows, mask=rows < q_len, other=0.0)
    sparse_lse = tl.load(sparse_lse_ptr + pair * q_len + rows, mask=rows < q_len, other=0.0)
    wide_share, sparse_share, _ = _shares(wide_lse, sparse_lse, DISJOINT)
    z = tl.load(gate_ptr + head // group).to(tl.float32)
    wide = _load(wide_ptr, stride_wb, stride_wh, stride_wn, stride_wd, b, head, rows, dims, inside)
    sparse = _load(sparse_ptr, stride_sb, stride_sh, stride_sn, stride_sd, b, head, rows, dims, inside)
    out = (z * wide_share)[:, None] * wide + (z * sparse_share + (1 - z))[:, None] * sparse
    far = rows.to(tl.int64)[:, None]
    pointers = out_ptr + b * stride_ob + head * stride_oh + far * stride_on + dims[None, :] * stride_od
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_len", "rows_total"])
def _unblend_kernel(
    grad_ptr, wide_ptr, sparse_ptr, wide_lse_ptr, sparse_lse_ptr, gate_ptr, lses_ptr, deltas_ptr, partials_ptr,
    stride_gb, stride_gh, stride_gn, stride_gd, stride_wb, stride_wh, stride_wn, stride_wd,
    stride_sb, stride_sh, stride_sn, stride_sd, num_heads, group, q_len, rows_total,
    DISJOINT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, batch * heads). lses, deltas `[2, batch, heads, q_len]`, partials `[batch, heads, tiles]`.

    `rows_total` is batch * heads * q_len.
    """
    pair = tl.program_id(1).to(tl.int64)
    b = pair // num_heads
    head = pair % num_heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BLOCK_D)
    exists = rows < q_len
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    at = pair * q_len + rows
    wide_lse = tl.load(wide_lse_ptr + at, mask=exists, other=0.0)
    sparse_lse = tl.load(sparse_lse_ptr + at, mask=exists, other=0.0)
    wide_share, sparse_share, full_lse = _shares(wide_lse, sparse_lse, DISJOINT)
    z = tl.load(gate_ptr + head // group).to(tl.float32)
    grad = _load(grad_ptr, stride_gb, stride_gh, stride_gn, stride_gd, b, head, rows, dims, inside)
    wide = _load(wide_ptr, stride_wb, stride_wh, stride_wn, stride_wd, b, head, rows, dims, inside)
    wide_delta = tl.sum(grad * wide, 1)
    sparse = _load(sparse_ptr, stride_sb, stride_sh, stride_sn, stride_sd, b, head, rows, dims, inside)
    sparse_delta = tl.sum(grad * sparse, 1)
    full_delta = wide_share * wide_delta + sparse_share * sparse_delta
    both = z * sparse_share
    weight = both + (1 - z)
    mixed_delta = (both * full_delta + (1 - z) * sparse_delta) / tl.where(weight == 0, 1.0, weight)
    has_wide, has_sparse = wide_lse != float("-inf"), sparse_lse != float("-inf")
    wide_lse = tl.where(has_wide, _weighted_lse(full_lse, tl.zeros_like(full_lse) + z), float("-inf"))
    tl.store(lses_ptr + at, wide_lse, mask=exists)
    tl.store(lses_ptr + rows_total + at, _weighted_lse(sparse_lse, weight), mask=exists)
    tl.store(deltas_ptr + at, tl.where(has_wide, full_delta, 0.0), mask=exists)
    tl.store(deltas_ptr + rows_total + at, tl.where(has_sparse, mixed_delta, 0.0), mask=exists)
    # The gate's gradient is rowsum(dO * (full - sparse)).
    slope = tl.sum(tl.where(exists, wide_share * (wide_delta - sparse_delta), 0.0), 0)
    tl.store(partials_ptr + pair * tl.num_programs(0) + tl.program_id(0), slope)


def blend(
    gate: Tensor, wide: Tensor, wide_lse: Tensor, sparse: Tensor, sparse_lse: Tensor, *, disjoint: bool
) -> Tensor:
    """The output of `mixed_attention`, like `wide`.

    Args:
        gate: `[num_kv_heads]`.
        wide, sparse: `[batch, num_heads, q_len, head_dim]`, any strides; 0 in rows without key.
        wide_lse, sparse_lse: fp32 `[batch, num_heads, q_len]`, contiguous; -inf in rows without key.
        disjoint: no row reads a key in both.
    """
    out = new_heads(wide)
    if out.numel() == 0:
        return out
    grid, options = _launch(wide, disjoint)
    with on_device_of(wide):
        _blend_kernel[grid](
            wide, sparse, wide_lse, sparse_lse, gate.contiguous(), out, *wide.stride(), *sparse.stride(), *out.stride(),
            wide.shape[1], wide.shape[1] // len(gate), wide.shape[2], **options,
        )  # fmt: skip
    return out


def unblend(
    grad_out: Tensor, gate: Tensor, wide: Tensor, wide_lse: Tensor, sparse: Tensor, sparse_lse: Tensor,
    *, disjoint: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the backward passes of both parts are given as log-sum-exps and deltas, and the gradient of the gate.

    Args:
        grad_out: gradient of the output, any strides.
        gate, wide, wide_lse, sparse, sparse_lse, disjoint: as in `blend`.

    Returns:
        Log-sum-exps and deltas, fp32 `[2, batch, num_heads, q_len]` each, of `wide` and `sparse`; fp32
        `[num_kv_heads]`, with the same bits in every run.
    """
    batch, num_heads, q_len, _ = wide.shape
    lses, deltas = (torch.empty(2, batch, num_heads, q_len, dtype=torch.float32, device=wide.device) for _ in range(2))
    if wide.numel() == 0:
        return lses, deltas, torch.zeros_like(gate, dtype=torch.float32)
    grid, options = _launch(wide, disjoint)
    partials = torch.empty(batch, num_heads, grid[0], dtype=torch.float32, device=wide.device)
    with on_device_of(wide):
        _unblend_kernel[grid](
            grad_out, wide, sparse, wide_lse, sparse_lse, gate.contiguous(), lses, deltas, partials,
            *grad_out.stride(), *wide.stride(), *sparse.stride(),
            num_heads, num_heads // len(gate), q_len, batch * num_heads * q_len, **options,
        )  # fmt: skip
    return lses, deltas, partials.unflatten(1, (len(gate), -1)).sum((0, 2, 3))


def _launch(wide: Tensor, disjoint: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    batch, num_heads, q_len, head_dim = wide.shape
    block_d = triton.next_power_of_2(head_dim)
    rows = max(16, ELEMENTS // block_d)
    options = dict(DISJOINT=disjoint, HEAD_DIM=head_dim, BLOCK_D=block_d, BM=rows, num_warps=4)
    return (triton.cdiv(q_len, rows), batch * num_heads), options
