"""Forward: one program per tile of query rows walks the blocks of keys that its row of the table names."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.configs import DECODE_ROWS, TileConfig
from sparse_hf_kernels.sparse_attention.triton.launch import (
    config_for,
    mask_arguments,
    new_heads,
    on_device_of,
    options,
    require_positive,
    table_for,
    unit_stride,
)
from sparse_hf_kernels.sparse_attention.triton.masks import (
    LN_2,
    MASKED,
    ROW_INTS,
    allowed,
    full_block,
    full_steps,
    load_tile,
    partial_block,
    partial_steps,
    row_bounds,
    row_coordinates,
    store_tile,
)
from sparse_hf_kernels.tiles import TileTable, forward_table


@triton.jit
def _accumulate(acc, top, total, scores, v, scale):
    """One step of the online softmax in base 2; `scores` are products of q and k, `top` is scaled already."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "offset", "start", "max_distance", "num_dense_rows", "num_last", "look_up_rows",
    ]
)  # fmt: skip
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, schedule_ptr, lists_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, num_heads, group, scale,
    q_len, kv_len, offset, start, q_stride, k_stride, q_pos_ptr, q_start_ptr, q_end_ptr, k_pos_ptr,
    look_up_ptr, head_plane_ptr, look_up_size, look_up_rows, max_distance, num_dense_rows, num_last,
    CAUSAL: tl.constexpr, LAST: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: the tiles of a forward table. `scale` includes log2(e); out like q, lse `[batch, num_heads, q_len]`."""
    row_ptr = rows_ptr + tl.load(schedule_ptr + 2 * tl.program_id(0)).to(tl.int64) * ROW_INTS
    b = tl.load(schedule_ptr + 2 * tl.program_id(0) + 1) // num_heads
    head = tl.load(schedule_ptr + 2 * tl.program_id(0) + 1) % num_heads
    kv_head = head // group
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh

    first_row = tl.load(row_ptr) * BM
    at = tl.load(row_ptr + 1)
    rows = first_row + tl.arange(0, BM)
    q = load_tile(q_ptr, first_row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    top = tl.full([BM], MASKED, tl.float32)
    total = tl.zeros([BM], tl.float32)

    num_full, end0, shift0, shift1 = full_steps(row_ptr)
    for i in tl.range(0, num_full):
        key = full_block(i, lists_ptr, at, end0, shift0, shift1, LISTS) * BN
        k = load_tile(k_ptr, key, stride_kn, kv_len, BN, HEAD_DIM, BLOCK_D, False)
        scores = tl.dot(q, k.T, input_precision="ieee")
        v = load_tile(v_ptr, key, stride_vn, kv_len, BN, HEAD_DIM, BLOCK_D, False)
        acc, top, total = _accumulate(acc, top, total, scores, v, scale)

    pos, begin, end = row_coordinates(
        rows, b, q_len, kv_len, offset, start, q_stride, q_pos_ptr, q_start_ptr, q_end_ptr,
        LAST or not CAUSAL,
    )  # fmt: skip
    near, near_end, first, sink_end = row_bounds(
        pos, begin, end, row_ptr, kv_len, max_distance, num_dense_rows, num_last, k_pos_ptr, CAUSAL, LAST
    )
    plane = kv_head
    if look_up_ptr is not None:
        plane = tl.load(head_plane_ptr + kv_head)
    num_steps, end2, end3, end4, shift2, shift3, shift4, shift5 = partial_steps(row_ptr)
    for i in tl.range(num_full, num_steps):
        key = partial_block(i, lists_ptr, at, end2, end3, end4, shift2, shift3, shift4, shift5, LISTS) * BN
        k = load_tile(k_ptr, key, stride_kn, kv_len, BN, HEAD_DIM, BLOCK_D, True)
        scores = tl.dot(q, k.T, input_precision="ieee")
        keep = allowed(
            near, near_end, first, sink_end, pos, begin, key, b, kv_len, k_stride, k_pos_ptr,
            look_up_ptr, plane, look_up_size, look_up_rows, num_dense_rows, BN, 0,
        )  # fmt: skip
        # `top` stays finite, so that -inf gives the weight 0 even in rows that have read no key yet.
        scores = tl.where(keep, scores, float("-inf"))
        v = load_tile(v_ptr, key, stride_vn, kv_len, BN, HEAD_DIM, BLOCK_D, True)
        acc, top, total = _accumulate(acc, top, total, scores, v, scale)

    # A row without token may have read full blocks. `!=`, so that NaN stays NaN.
    some = (total != 0) & (pos >= begin)
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN_2, float("-inf"))
    out_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    store_tile(out_ptr, acc, first_row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D)
    lse_ptr += (b * num_heads + head).to(tl.int64) * q_len
    tl.store(lse_ptr + rows, lse, mask=rows < q_len)


def forward(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see `AttentionKernels.forward`.

    Raises:
        ValueError: for a scale that is not positive.
    """
    require_positive(problem.scale)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, lse = new_heads(q), torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    config = config_for(q, problem, "decode" if q.shape[2] <= DECODE_ROWS else "forward")
    table = table_for(forward_table, q, problem, config)
    arguments, keywords = forward_arguments(q, k, v, out, lse, problem, table, config)
    with on_device_of(q):
        _forward_kernel[(table.num_tiles,)](*arguments, **keywords)
    return out, lse


def forward_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: AttentionProblem, table: TileTable,
    config: TileConfig,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of `_forward_kernel`."""
    arguments = (
        q, k, v, out, lse, table.rows, table.schedule, table.lists,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        q.shape[1], q.shape[1] // k.shape[1], problem.scale * math.log2(math.e), *mask_arguments(problem, table),
    )  # fmt: skip
    return arguments, options(problem, table, q.shape[3], config)
