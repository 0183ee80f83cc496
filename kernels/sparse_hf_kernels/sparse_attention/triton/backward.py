"""Backward in two kernels without atomics, so that every run gives the same bits: dK and dV, then dQ."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.configs import TileConfig
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
    LOG2_E,
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
from sparse_hf_kernels.tiles import TileTable, backward_table, forward_table


@triton.jit
def _row_statistics(lse_ptr, delta_ptr, rows, q_len):
    """Log-sum-exp in base 2, huge (so that weights are 0) for rows without key and past the end, and delta."""
    inside = rows < q_len
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
    return tl.where(lse == float("-inf"), 1.0e30, lse * LOG2_E), tl.load(delta_ptr + rows, mask=inside, other=0.0)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "offset", "start", "max_distance", "num_dense_rows", "num_last", "look_up_rows",
    ]
)  # fmt: skip
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, rows_ptr, schedule_ptr, lists_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, num_kv_heads, group, group_stride, scale,
    q_len, kv_len, offset, start, q_stride, k_stride, q_pos_ptr, q_start_ptr, q_end_ptr, k_pos_ptr,
    look_up_ptr, head_plane_ptr, look_up_size, look_up_rows, max_distance, num_dense_rows, num_last,
    CAUSAL: tl.constexpr, LAST: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: the tiles of a backward table. Scores are transposed, `[BN, BM]`; dk and dv share strides `stride_g*`."""
    scheduled = tl.load(schedule_ptr + 2 * tl.program_id(0)).to(tl.int64)
    b = tl.load(schedule_ptr + 2 * tl.program_id(0) + 1) // num_kv_heads
    kv_head = tl.load(schedule_ptr + 2 * tl.program_id(0) + 1) % num_kv_heads
    k_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    key = tl.load(rows_ptr + scheduled * ROW_INTS) * BN
    k = load_tile(k_ptr, key, stride_kn, kv_len, BN, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr, key, stride_vn, kv_len, BN, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros([BN, BLOCK_D], tl.float32)
    dv = tl.zeros([BN, BLOCK_D], tl.float32)
    plane = kv_head
    if look_up_ptr is not None:
        plane = tl.load(head_plane_ptr + kv_head)
    scale_log2 = scale * LOG2_E

    for g in range(0, group):
        head = kv_head * group + g
        row_ptr = rows_ptr + (scheduled + g * group_stride) * ROW_INTS
        at = tl.load(row_ptr + 1)
        head_q = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        head_do = do_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        first_stat = (b * (num_kv_heads * group) + head).to(tl.int64) * q_len
        num_full, end0, shift0, shift1 = full_steps(row_ptr)
        for i in tl.range(0, num_full):
            row = full_block(i, lists_ptr, at, end0, shift0, shift1, LISTS) * BM
            rows = row + tl.arange(0, BM)
            q = load_tile(head_q, row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
            lse, delta = _row_statistics(lse_ptr + first_stat, delta_ptr + first_stat, rows, q_len)
            weights = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale_log2 - lse[None, :])
            do = load_tile(head_do, row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D, True)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            slopes = weights * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
            dk = tl.dot(slopes.to(q.dtype), q, dk, input_precision="ieee")
        num_steps, end2, end3, end4, shift2, shift3, shift4, shift5 = partial_steps(row_ptr)
        for i in tl.range(num_full, num_steps):
            row = partial_block(i, lists_ptr, at, end2, end3, end4, shift2, shift3, shift4, shift5, LISTS) * BM
            rows = row + tl.arange(0, BM)
            q = load_tile(head_q, row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
            lse, delta = _row_statistics(lse_ptr + first_stat, delta_ptr + first_stat, rows, q_len)
            weights = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale_log2 - lse[None, :])
            pos, begin, end = row_coordinates(
                rows, b, q_len, kv_len, offset, start, q_stride, q_pos_ptr, q_start_ptr, q_end_ptr,
                LAST or not CAUSAL,
            )  # fmt: skip
            near, near_end, first, sink_end = row_bounds(
                pos, begin, end, row_ptr, kv_len, max_distance, num_dense_rows, num_last, k_pos_ptr, CAUSAL, LAST
            )
            keep = allowed(
                near, near_end, first, sink_end, pos, begin, key, b, kv_len, k_stride, k_pos_ptr,
                look_up_ptr, plane, look_up_size, look_up_rows, num_dense_rows, BN, 1,
            )  # fmt: skip
            weights = tl.where(keep, weights, 0.0)
            do = load_tile(head_do, row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D, True)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            slopes = weights * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
            dk = tl.dot(slopes.to(q.dtype), q, dk, input_precision="ieee")

    at_head = b.to(tl.int64) * stride_gb + kv_head.to(tl.int64) * stride_gh
    store_tile(dk_ptr + at_head, dk * scale, key, stride_gn, kv_len, BN, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr + at_head, dv, key, stride_gn, kv_len, BN, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "offset", "start", "max_distance", "num_dense_rows", "num_last", "look_up_rows",
    ]
)  # fmt: skip
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, rows_ptr, schedule_ptr, lists_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, num_heads, group, scale,
    q_len, kv_len, offset, start, q_stride, k_stride, q_pos_ptr, q_start_ptr, q_end_ptr, k_pos_ptr,
    look_up_ptr, head_plane_ptr, look_up_size, look_up_rows, max_distance, num_dense_rows, num_last,
    CAUSAL: tl.constexpr, LAST: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: the tiles of a forward table. dq has strides `stride_g*`."""
    row_ptr = rows_ptr + tl.load(schedule_ptr + 2 * tl.program_id(0)).to(tl.int64) * ROW_INTS
    b = tl.load(schedule_ptr + 2 * tl.program_id(0) + 1) // num_heads
    head = tl.load(schedule_ptr + 2 * tl.program_id(0) + 1) % num_heads
    kv_head = head // group
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    do_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    k_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    first_row = tl.load(row_ptr) * BM
    at = tl.load(row_ptr + 1)
    rows = first_row + tl.arange(0, BM)
    q = load_tile(q_ptr, first_row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_ptr, first_row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D, True)
    first_stat = (b * num_heads + head).to(tl.int64) * q_len
    lse, delta = _row_statistics(lse_ptr + first_stat, delta_ptr + first_stat, rows, q_len)
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([BM, BLOCK_D], tl.float32)

    num_full, end0, shift0, shift1 = full_steps(row_ptr)
    for i in tl.range(0, num_full):
        key = full_block(i, lists_ptr, at, end0, shift0, shift1, LISTS) * BN
        k = load_tile(k_ptr, key, stride_kn, kv_len, BN, HEAD_DIM, BLOCK_D, False)
        weights = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale_log2 - lse[:, None])
        v = load_tile(v_ptr, key, stride_vn, kv_len, BN, HEAD_DIM, BLOCK_D, False)
        slopes = weights * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(slopes.to(k.dtype), k, dq, input_precision="ieee")

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
        weights = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale_log2 - lse[:, None])
        keep = allowed(
            near, near_end, first, sink_end, pos, begin, key, b, kv_len, k_stride, k_pos_ptr,
            look_up_ptr, plane, look_up_size, look_up_rows, num_dense_rows, BN, 0,
        )  # fmt: skip
        weights = tl.where(keep, weights, 0.0)
        v = load_tile(v_ptr, key, stride_vn, kv_len, BN, HEAD_DIM, BLOCK_D, True)
        slopes = weights * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(slopes.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += b.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    store_tile(dq_ptr, dq * scale, first_row, stride_gn, q_len, BM, HEAD_DIM, BLOCK_D)


def backward(
    grad_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, problem: AttentionProblem
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; see `AttentionKernels.backward`.

    Raises:
        ValueError: for a scale that is not positive.
    """
    require_positive(problem.scale)
    q, k, v, grad_out = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(grad_out)
    dq, dk, dv = new_heads(q), new_heads(k), new_heads(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    inputs = (q, k, v, grad_out, lse, delta)
    key_gradients(inputs, dk, dv, problem)
    query_gradient(inputs, dq, problem)
    return dq, dk, dv


def key_gradients(inputs: tuple[Tensor, ...], dk: Tensor, dv: Tensor, problem: AttentionProblem) -> None:
    """Writes dK and dV; `inputs` are q, k, v, grad_out (last dimension dense), lse and delta."""
    config = config_for(inputs[0], problem, "dkdv")
    table = table_for(backward_table, inputs[0], problem, config)
    with on_device_of(inputs[0]):
        arguments, keywords = dkdv_arguments(inputs, dk, dv, problem, table, config)
        _dkdv_kernel[(table.num_tiles,)](*arguments, **keywords)


def query_gradient(inputs: tuple[Tensor, ...], dq: Tensor, problem: AttentionProblem) -> None:
    """Writes dQ; `inputs` as in `key_gradients`."""
    config = config_for(inputs[0], problem, "dq")
    table = table_for(forward_table, inputs[0], problem, config)
    with on_device_of(inputs[0]):
        arguments, keywords = dq_arguments(inputs, dq, problem, table, config)
        _dq_kernel[(table.num_tiles,)](*arguments, **keywords)


def dkdv_arguments(
    inputs: tuple[Tensor, ...], dk: Tensor, dv: Tensor, problem: AttentionProblem, table: TileTable, config: TileConfig
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `_dkdv_kernel`; `inputs` are q, k, v, grad_out, lse and delta."""
    q, k, v, grad_out = inputs[:4]
    arguments = (
        *inputs, dk, dv, table.rows, table.schedule, table.lists,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dk.stride()[:3],
        k.shape[1], q.shape[1] // k.shape[1], table.group_stride, problem.scale, *mask_arguments(problem, table),
    )  # fmt: skip
    return arguments, options(problem, table, q.shape[3], config)


def dq_arguments(
    inputs: tuple[Tensor, ...], dq: Tensor, problem: AttentionProblem, table: TileTable, config: TileConfig
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `_dq_kernel`; `inputs` are q, k, v, grad_out, lse and delta."""
    q, k, v, grad_out = inputs[:4]
    arguments = (
        *inputs, dq, table.rows, table.schedule, table.lists,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
        q.shape[1], q.shape[1] // k.shape[1], problem.scale, *mask_arguments(problem, table),
    )  # fmt: skip
    return arguments, options(problem, table, q.shape[3], config)
