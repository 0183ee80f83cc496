"""Attention over single columns: forward, dQ, dK and dV, and the sum of the latter at the columns' places.

K and V rows of a head's columns lie side by side, `[batch, num_heads, num_columns, head_dim]`, ascending by position,
entries without column (position NONE) last; num_columns is a multiple of BN. A row reads a column that stands no later
than itself, unless the blocks listed for the row's block hold it already: `covered_ptr`, int8 `[batch, num_heads,
num_row_blocks, num_kv_blocks]`. Tiles of BM rows lie within one block. Nothing is added by atomics.
"""

import triton
import triton.language as tl

from sparse_hf_kernels.sparse_attention.triton.backward import _row_statistics
from sparse_hf_kernels.sparse_attention.triton.forward import _accumulate
from sparse_hf_kernels.sparse_attention.triton.masks import LN_2, LOG2_E, MASKED, load_tile, store_tile

NONE = tl.constexpr(2**31 - 1)  # as in launch: after every row


@triton.jit
def _load_columns(ptr, start, BN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns [start, start + BN) of one head's K or V, `[BN, BLOCK_D]`."""
    columns = start + tl.arange(0, BN)
    dims = tl.arange(0, BLOCK_D)
    pointers = ptr + columns[:, None] * HEAD_DIM + dims[None, :]
    if HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _first_readers(positions, covered_ptr, num_kv_blocks, BLOCK_SIZE: tl.constexpr):
    """The first position whose query reads each column, among those of the block row at `covered_ptr`; NONE if none."""
    blocks = positions // BLOCK_SIZE
    covered = tl.load(covered_ptr + blocks, mask=blocks < num_kv_blocks, other=1)
    return tl.where(covered != 0, NONE, positions)


@triton.jit(do_not_specialize=["q_len", "offset", "num_columns", "num_row_blocks", "num_kv_blocks"])
def _column_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, positions_ptr, stops_ptr, covered_ptr, heads_ptr,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, num_listed, num_heads, scale,
    q_len, offset, num_columns, num_row_blocks, num_kv_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, batch * heads of `heads_ptr`). Continues the softmax of out and lse, in place.

    `scale` includes log2(e). stops int32 `[batch, num_heads, row tiles]`: how many columns the tile's last row reaches.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b = tl.program_id(1) // num_listed
    head = tl.load(heads_ptr + tl.program_id(1) % num_listed)
    pair = (b * num_heads + head).to(tl.int64)
    stop = tl.load(stops_ptr + pair * tl.num_programs(0) + tile)
    if stop == 0:
        return
    first_row = tile * BM
    rows = first_row + tl.arange(0, BM)
    pos = rows + offset
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    out_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    k_ptr += pair * num_columns * HEAD_DIM
    v_ptr += pair * num_columns * HEAD_DIM
    positions_ptr += pair * num_columns
    covered_ptr += (pair * num_row_blocks + first_row // BLOCK_SIZE) * num_kv_blocks
    lse_ptr += pair * q_len

    q = load_tile(q_ptr, first_row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
    acc = load_tile(out_ptr, first_row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=rows < q_len, other=float("-inf"))
    total = tl.where(lse == float("-inf"), 0.0, 1.0)
    # Finite in rows that have read no key yet: -inf minus -inf is NaN.
    top = tl.where(lse == float("-inf"), MASKED, lse * LOG2_E)
    for start in tl.range(0, stop, BN):
        k = _load_columns(k_ptr, start, BN, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision="ieee")
        positions = tl.load(positions_ptr + start + tl.arange(0, BN))
        readers = _first_readers(positions, covered_ptr, num_kv_blocks, BLOCK_SIZE)
        scores = tl.where(readers[None, :] <= pos[:, None], scores, float("-inf"))
        v = _load_columns(v_ptr, start, BN, HEAD_DIM, BLOCK_D)
        acc, top, total = _accumulate(acc, top, total, scores, v, scale)

    some = total != 0  # `!=`, so that NaN stays NaN
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN_2, float("-inf"))
    store_tile(out_ptr, acc, first_row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + rows, lse, mask=rows < q_len)


@triton.jit(do_not_specialize=["q_len", "offset", "num_columns", "num_row_blocks", "num_kv_blocks"])
def _column_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, positions_ptr, stops_ptr, covered_ptr, heads_ptr,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    num_listed, num_heads, scale, q_len, offset, num_columns, num_row_blocks, num_kv_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid and stops as in the forward; adds to dq, which has strides `stride_g*`. `scale` is natural."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // num_listed
    head = tl.load(heads_ptr + tl.program_id(1) % num_listed)
    pair = (b * num_heads + head).to(tl.int64)
    stop = tl.load(stops_ptr + pair * tl.num_programs(0) + tile)
    if stop == 0:
        return
    first_row = tile * BM
    rows = first_row + tl.arange(0, BM)
    pos = rows + offset
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    do_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    dq_ptr += b.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    k_ptr += pair * num_columns * HEAD_DIM
    v_ptr += pair * num_columns * HEAD_DIM
    positions_ptr += pair * num_columns
    covered_ptr += (pair * num_row_blocks + first_row // BLOCK_SIZE) * num_kv_blocks

    q = load_tile(q_ptr, first_row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_ptr, first_row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D, True)
    lse, delta = _row_statistics(lse_ptr + pair * q_len, delta_ptr + pair * q_len, rows, q_len)
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    for start in tl.range(0, stop, BN):
        k = _load_columns(k_ptr, start, BN, HEAD_DIM, BLOCK_D)
        weights = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale_log2 - lse[:, None])
        positions = tl.load(positions_ptr + start + tl.arange(0, BN))
        readers = _first_readers(positions, covered_ptr, num_kv_blocks, BLOCK_SIZE)
        weights = tl.where(readers[None, :] <= pos[:, None], weights, 0.0)
        v = _load_columns(v_ptr, start, BN, HEAD_DIM, BLOCK_D)
        slopes = weights * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(slopes.to(k.dtype), k, dq, input_precision="ieee")

    before = load_tile(dq_ptr, first_row, stride_gn, q_len, BM, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    store_tile(dq_ptr, before + dq * scale, first_row, stride_gn, q_len, BM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["q_len", "offset", "num_columns", "num_row_blocks", "num_kv_blocks"])
def _column_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, positions_ptr, covered_ptr, heads_ptr,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    num_listed, num_heads, scale, q_len, offset, num_columns, num_row_blocks, num_kv_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (column tiles, batch * heads of `heads_ptr`). dk and dv fp32, laid out like k and v.

    Tiles without a column that some row reaches are not written. Scores are transposed, `[BN, BM]`.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1) // num_listed
    head = tl.load(heads_ptr + tl.program_id(1) % num_listed)
    pair = (b * num_heads + head).to(tl.int64)
    positions = tl.load(positions_ptr + pair * num_columns + columns)
    first = tl.maximum(tl.min(positions, 0) - offset, 0)
    if first >= q_len:
        return
    at_head = pair * num_columns * HEAD_DIM
    k = _load_columns(k_ptr + at_head, tl.program_id(0) * BN, BN, HEAD_DIM, BLOCK_D)
    v = _load_columns(v_ptr + at_head, tl.program_id(0) * BN, BN, HEAD_DIM, BLOCK_D)
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    do_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    lse_ptr += pair * q_len
    delta_ptr += pair * q_len
    covered_ptr += pair * num_row_blocks * num_kv_blocks
    dk = tl.zeros([BN, BLOCK_D], tl.float32)
    dv = tl.zeros([BN, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    first_tile = first // BM
    for i in tl.range(0, tl.cdiv(q_len, BM) - first_tile):
        row = (first_tile + i) * BM
        rows = row + tl.arange(0, BM)
        q = load_tile(q_ptr, row, stride_qn, q_len, BM, HEAD_DIM, BLOCK_D, True)
        lse, delta = _row_statistics(lse_ptr, delta_ptr, rows, q_len)
        weights = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale_log2 - lse[None, :])
        readers = _first_readers(
            positions, covered_ptr + (row // BLOCK_SIZE).to(tl.int64) * num_kv_blocks, num_kv_blocks, BLOCK_SIZE
        )
        weights = tl.where(readers[:, None] <= (rows + offset)[None, :], weights, 0.0)
        do = load_tile(do_ptr, row, stride_on, q_len, BM, HEAD_DIM, BLOCK_D, True)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        slopes = weights * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
        dk = tl.dot(slopes.to(q.dtype), q, dk, input_precision="ieee")

    dims = tl.arange(0, BLOCK_D)
    pointers = at_head + columns[:, None] * HEAD_DIM + dims[None, :]
    inside = (positions < NONE)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dk_ptr + pointers, dk * scale, mask=inside)
    tl.store(dv_ptr + pointers, dv, mask=inside)


@triton.jit(do_not_specialize=["num_entries", "num_keys"])
def _column_sum_kernel(
    dk_parts_ptr, dv_parts_ptr, positions_ptr, order_ptr, dk_ptr, dv_ptr, kv_heads_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_listed, num_kv_heads, group, num_entries, num_keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: (entry tiles, batch * heads of `kv_heads_ptr`). Adds the parts of a group's heads to dk and dv.

    Parts fp32 `[batch, num_kv_heads, num_entries, HEAD_DIM]`; positions int32 `[batch, num_kv_heads, num_entries]`
    ascending, entry e being row order[e] of the parts. A position has at most `group` entries, side by side: the first
    sums them in order and owns the key. Those from `num_keys` on, which no row reaches, are passed over.
    """
    b = tl.program_id(1) // num_listed
    kv_head = tl.load(kv_heads_ptr + tl.program_id(1) % num_listed)
    at_head = (b * num_kv_heads + kv_head).to(tl.int64) * num_entries
    positions_ptr += at_head
    order_ptr += at_head
    dk_parts_ptr += at_head * HEAD_DIM
    dv_parts_ptr += at_head * HEAD_DIM
    entries = tl.program_id(0) * BE + tl.arange(0, BE)
    positions = tl.load(positions_ptr + entries, mask=entries < num_entries, other=NONE)
    before = tl.load(positions_ptr + entries - 1, mask=(entries > 0) & (entries < num_entries), other=-1)
    owned = (positions < num_keys) & (positions != before)
    dims = tl.arange(0, BLOCK_D)
    dk = tl.zeros([BE, BLOCK_D], tl.float32)
    dv = tl.zeros([BE, BLOCK_D], tl.float32)
    for g in range(0, group):
        beside = entries + g
        other = tl.load(positions_ptr + beside, mask=beside < num_entries, other=NONE)
        same = owned & (other == positions)
        row = tl.load(order_ptr + beside, mask=same, other=0)
        pointers = row[:, None] * HEAD_DIM + dims[None, :]
        inside = same[:, None] & (dims < HEAD_DIM)[None, :]
        dk += tl.load(dk_parts_ptr + pointers, mask=inside, other=0.0)
        dv += tl.load(dv_parts_ptr + pointers, mask=inside, other=0.0)
    inside = owned[:, None] & (dims < HEAD_DIM)[None, :]
    keys = positions.to(tl.int64)[:, None]
    dk_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    dv_ptr += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    dk_ptr += keys * stride_kn + dims[None, :]
    dv_ptr += keys * stride_vn + dims[None, :]
    dk += tl.load(dk_ptr, mask=inside, other=0.0).to(tl.float32)
    dv += tl.load(dv_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(dk_ptr, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr, dv.to(dv_ptr.dtype.element_ty), mask=inside)
