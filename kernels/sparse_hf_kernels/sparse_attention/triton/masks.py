"""What the forward and the backward kernels share: walking a tile table, loads, and the element mask of a block.

Legend: BM query rows, BN keys, BLOCK_D >= HEAD_DIM (a power of two). `ROW_DIM` is the dimension of a score tile that
query rows lie along: 0 for [BM, BN], 1 for its transpose. The table is `sparse_hf_kernels.tiles.TileTable`.
"""

import triton
import triton.language as tl

ROW_INTS = tl.constexpr(16)  # as in tiles.table
MASKED = tl.constexpr(-1.0e30)  # finite: -inf minus -inf is NaN
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def full_steps(row_ptr):
    """Of a row: number of full steps, and the first piece's end and both offsets."""
    return tl.load(row_ptr + 3), tl.load(row_ptr + 2), tl.load(row_ptr + 8), tl.load(row_ptr + 9)


@triton.jit
def full_block(i, lists_ptr, at, end0, shift0, shift1, LISTS: tl.constexpr):
    """The block of full step i; `at` is the row's offset into the lists, negative if it walks pieces."""
    block = i + tl.where(i < end0, shift0, shift1)
    if LISTS:
        block = tl.where(at >= 0, tl.load(lists_ptr + at + i, mask=at >= 0, other=0), block)
    return block


@triton.jit
def partial_steps(row_ptr):
    """Of a row: the end of all steps, the ends of pieces 2 to 4 and the offsets of pieces 2 to 5."""
    return (
        tl.load(row_ptr + 7),
        tl.load(row_ptr + 4),
        tl.load(row_ptr + 5),
        tl.load(row_ptr + 6),
        tl.load(row_ptr + 10),
        tl.load(row_ptr + 11),
        tl.load(row_ptr + 12),
        tl.load(row_ptr + 13),
    )


@triton.jit
def partial_block(
    i, lists_ptr, at, end2, end3, end4, shift2, shift3, shift4, shift5, LISTS: tl.constexpr,
):  # fmt: skip
    """The block of partial step i."""
    block = i + tl.where(i < end2, shift2, tl.where(i < end3, shift3, tl.where(i < end4, shift4, shift5)))
    if LISTS:
        block = tl.where(at >= 0, tl.load(lists_ptr + at + i, mask=at >= 0, other=0), block)
    return block


@triton.jit
def load_tile(
    ptr, first, stride, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + BLOCK) of one head `[BLOCK, BLOCK_D]`, 0 outside; without BOUND all rows exist."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    # int64 once per tile; within a tile int32 is enough.
    pointers = ptr + first.to(tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if BOUND:
        inside = (first + rows < length)[:, None]
        if HEAD_DIM < BLOCK_D:
            inside = inside & (dims < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    ptr, tile, first, stride, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    pointers = ptr + first.to(tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    inside = (first + rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_coordinates(
    rows, b, q_len, kv_len, offset, start, q_stride, q_pos_ptr, q_start_ptr, q_end_ptr, ENDS: tl.constexpr,
):  # fmt: skip
    """Where rows stand, where their sequences begin and end: int32 `[BM]` each. Rows without token have pos < start."""
    if q_pos_ptr is None:
        pos = rows + offset
        begin = tl.zeros_like(rows) + start
        end = tl.zeros_like(rows) + kv_len
    else:
        inside = rows < q_len
        at = b * q_stride + rows
        pos = tl.load(q_pos_ptr + at, mask=inside, other=-1)
        begin = tl.load(q_start_ptr + at, mask=inside, other=0)
        end = begin
        if ENDS:  # else they go unread
            end = tl.load(q_end_ptr + at, mask=inside, other=0)
    return pos, begin, end


@triton.jit
def row_bounds(
    pos, begin, end, row_ptr, kv_len, max_distance, num_dense_rows, num_last, k_pos_ptr, CAUSAL: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """The keys that rows read, block masks apart: [near, near_end) and [first, sink_end), int32 `[BM]` each.

    Rows without token stand at -1 and end at 0, before any key.
    """
    window = tl.load(row_ptr + 14)
    first = tl.maximum(begin, pos - max_distance + 1)
    near = tl.maximum(first, pos - tl.abs(window) + 1)
    dense = pos - begin < num_dense_rows
    if LAST:  # a negative window has dense last rows
        dense = dense | ((window < 0) & (pos >= end - num_last))
    near = tl.where(dense, first, near)
    if CAUSAL:
        limit = pos + 1
    else:
        limit = tl.minimum(end, pos + max_distance)
    if k_pos_ptr is None:
        limit = tl.minimum(limit, kv_len)
    near_end = limit
    if not CAUSAL:
        near_end = tl.minimum(limit, pos + window)
    sink_end = tl.minimum(begin + tl.load(row_ptr + 15), limit)
    return near, near_end, first, sink_end


@triton.jit
def allowed(
    near, near_end, first, sink_end, pos, begin, key, b, kv_len, k_stride, k_pos_ptr,
    look_up_ptr, plane, look_up_size, look_up_rows, num_dense_rows,
    BN: tl.constexpr, ROW_DIM: tl.constexpr,
):  # fmt: skip
    """Which keys [key, key + BN) rows may read, a boolean tile; `plane` masks by blocks unless it is negative."""
    columns = key + tl.arange(0, BN)
    if k_pos_ptr is not None:
        columns = tl.load(k_pos_ptr + b * k_stride + columns, mask=columns < kv_len, other=-1)
    COLUMN_DIM: tl.constexpr = 1 - ROW_DIM
    columns = tl.expand_dims(columns, ROW_DIM)
    keep = (columns >= tl.expand_dims(near, COLUMN_DIM)) & (columns < tl.expand_dims(near_end, COLUMN_DIM))
    sinks = (columns >= tl.expand_dims(first, COLUMN_DIM)) & (columns < tl.expand_dims(sink_end, COLUMN_DIM))
    keep = keep | sinks
    if look_up_ptr is not None:
        begin = tl.expand_dims(begin, COLUMN_DIM)
        place = tl.expand_dims(pos, COLUMN_DIM) - begin
        block_row = tl.minimum(tl.maximum(place // look_up_size, 0), look_up_rows - 1)
        block_column = tl.minimum(tl.maximum((columns - begin) // look_up_size, 0), look_up_rows - 1)
        pointers = look_up_ptr + plane.to(tl.int64) * look_up_rows * look_up_rows
        pointers = pointers + (block_row * look_up_rows + block_column)
        keep = keep & (tl.load(pointers, mask=keep & (plane >= 0) & (place >= num_dense_rows), other=1) != 0)
    return keep
