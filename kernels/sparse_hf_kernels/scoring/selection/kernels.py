"""Block selection without a sort: the threshold of a row is found bit by bit, its blocks held in registers.

Scores become unsigned integers of the same order, and 32 reductions fix the largest threshold at which the kept
blocks still suffice. Sums of non-negative floats over a fixed tree grow with the set, so the search is exact for the
sums it computes. Every program owns its outputs: nothing depends on the order of programs.
"""

import triton
import triton.language as tl


@triton.jit
def _ordered_bits(x):
    """uint32 of the same order as the floats of `x`; -0 counts as 0."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | -2147483648)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["num_cols", "first_block"])
def _select_kernel(
    scores_ptr, budget_ptr, counts_ptr, indices_ptr, num_cols, num_heads, first_block,
    stride_b, stride_h, stride_row,
    TOP_K: tl.constexpr, KEEP_SINK: tl.constexpr, KEEP_DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, batch * heads). budget [heads]: int32 counts (TOP_K) or fp32 shares of the row total.

    counts [batch * heads, rows] and indices [batch * heads, rows, num_cols] are contiguous.
    """
    row = tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // num_heads).to(tl.int64)
    h = pair % num_heads
    cols = tl.arange(0, BLOCK)
    diagonal = first_block + row
    causal = (cols < num_cols) & (cols <= diagonal)
    scores_ptr += b * stride_b + h.to(tl.int64) * stride_h + row.to(tl.int64) * stride_row
    scores = tl.load(scores_ptr + cols, mask=causal, other=0.0).to(tl.float32)
    forced = cols < 0
    if KEEP_SINK:
        forced = forced | (cols == 0)
    if KEEP_DIAGONAL:
        forced = forced | (cols == diagonal)
    forced = forced & causal
    if TOP_K:
        weights = causal.to(tl.int32)
        target = tl.load(budget_ptr + h)
    else:
        weights = scores
        share = tl.load(budget_ptr + h)
        # The whole mass is out of reach of a rounded sum: 1 means every block, not all but the smallest.
        target = tl.where(share < 1.0, share * tl.sum(scores), float("inf"))

    keys = _ordered_bits(scores)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 2147483648, tl.uint32)
    for _ in tl.range(0, 32):
        candidate = threshold | bit
        reached = tl.sum(tl.where(forced | (keys >= candidate), weights, 0)) >= target
        threshold = tl.where(reached, candidate, threshold)
        bit = bit >> 1

    # Everything above the threshold, and as many of those at it as are missing, the first ones.
    above = causal & (forced | (keys > threshold))
    at = causal & (keys == threshold) & (above == 0)
    missing = target - tl.sum(tl.where(above, weights, 0))
    if not TOP_K:
        value = tl.max(tl.where(at, scores, 0.0))
        missing = tl.where(value > 0.0, tl.ceil(missing / tl.where(value > 0.0, value, 1.0)), 0.0)
        missing = tl.minimum(missing, BLOCK * 1.0).to(tl.int32)
    rank = tl.cumsum(at.to(tl.int32), 0) - 1
    keep = above | (at & (rank < missing))
    slots = tl.cumsum(keep.to(tl.int32), 0) - 1
    line = pair.to(tl.int64) * tl.num_programs(0) + row
    tl.store(counts_ptr + line, tl.sum(keep.to(tl.int32)))
    tl.store(indices_ptr + line * num_cols + slots, cols, mask=keep)


@triton.jit(do_not_specialize=["num_slots", "num_cols"])
def _lists_to_mask_kernel(counts_ptr, indices_ptr, mask_ptr, num_slots, num_cols, BLOCK: tl.constexpr):
    """Grid: (lines). Sets mask[line, column] = 1 for each listed column; mask was zero."""
    line = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + line)
    for start in tl.range(0, count, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        listed = slots < count
        cols = tl.load(indices_ptr + line * num_slots + slots, mask=listed, other=0)
        tl.store(mask_ptr + line * num_cols + cols, tl.full([BLOCK], 1, tl.int8), mask=listed)


@triton.jit(do_not_specialize=["num_rows", "num_cols"])
def _transpose_kernel(
    mask_ptr, counts_ptr, indices_ptr, num_rows, num_cols, BR: tl.constexpr, BC: tl.constexpr,
    DESCENDING: tl.constexpr,
):  # fmt: skip
    """Grid: (column tiles, batch * heads). Lists the rows of each column of mask [rows, cols], in order."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    pair = tl.program_id(1).to(tl.int64)
    inside = cols < num_cols
    mask_ptr += pair * num_rows * num_cols
    lines = pair * num_cols + cols
    listed = tl.zeros([BC], tl.int32)
    for start in tl.range(0, num_rows, BR):
        rows = start + tl.arange(0, BR)
        if DESCENDING:
            rows = num_rows - 1 - rows
        pointers = mask_ptr + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
        exists = (rows >= 0) & (rows < num_rows)
        keep = tl.load(pointers, mask=exists[:, None] & inside[None, :], other=0).to(tl.int32)
        slots = listed[None, :] + tl.cumsum(keep, 0) - 1
        out = indices_ptr + lines[None, :] * num_rows + slots
        tl.store(out, tl.broadcast_to(rows[:, None], [BR, BC]), mask=keep != 0)
        listed += tl.sum(keep, 0)
    tl.store(counts_ptr + lines, listed, mask=inside)
