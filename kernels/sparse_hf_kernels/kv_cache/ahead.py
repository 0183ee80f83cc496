"""What the programs of a decode launch do while the kernel before it ends.

Their first tiles would come late otherwise: lengths have to be read before the first address is known, and memory is
idle meanwhile. What is read here only tells where to begin: tiles in L2 are right whatever the kernel before writes.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from sparse_hf_kernels.kv_cache.shares import blocks_of, pick_all, read_table, share_out, slots_of

PIECES = tl.constexpr(128)
"""Threads of a program that ask, each for as much as the others."""


@triton.jit
def _to_l2(ptr, size, MOST: tl.constexpr):
    """Has `size` bytes from `ptr` on brought into L2, at most MOST; all three are multiples of 16."""
    PIECE: tl.constexpr = (MOST // 16 + PIECES - 1) // PIECES * 16
    at = tl.arange(0, PIECES) * PIECE
    size = tl.minimum(size, MOST)
    tl.inline_asm_elementwise(
        "{ .reg .pred %p<1>; setp.ge.s32 %p0, $2, 16; @%p0 cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [ptr.to(tl.int64) + at, tl.minimum(size - at, PIECE)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_kernel_before(
    keys_ptr, values_ptr, state_ptr, heads_ptr, capacity, ring_slots, num_linear, num_rows, num_dense_rows,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, MIN_SHARE: tl.constexpr,
    HEAD_COST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Meanwhile has the first TILES blocks that this program is to read brought into L2, as far as can be seen by now.

    The lengths may be older than the launch: they are kept within what there is, and are read again later.
    """
    SLOT: tl.constexpr = D * keys_ptr.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.arange(0, ROWS)
    exists = rows < num_rows
    # Not by L1, which could give them again when they have changed.
    all_lengths = tl.load(state_ptr + 1 + rows // KV_HEADS, mask=exists, other=0, cache_modifier=".cg")
    all_recent, all_sinks, all_windows, all_places = read_table(heads_ptr, rows, exists, KV_HEADS)
    all_lengths = tl.minimum(tl.maximum(all_lengths, 0), tl.where(all_recent < 0, capacity, all_recent + all_sinks))
    _, _, counts, _ = blocks_of(all_lengths, all_recent, all_sinks, all_windows, num_dense_rows, BN)
    units, ends, unit, stop, _, _ = share_out(counts, exists, HEAD_COST, MIN_SHARE)
    here = (unit < ends) & (unit >= ends - units)
    row, end, length, recent, sinks, window, place = pick_all(
        rows, ends, all_lengths, all_recent, all_sinks, all_windows, all_places, here
    )
    sink_blocks, low_block, count, _ = blocks_of(length, recent, sinks, window, num_dense_rows, BN)
    i = tl.maximum(unit - (end - count), 0)
    slot = tl.where(i < sink_blocks, i, i - sink_blocks + low_block) * BN
    size = (tl.minimum(length, slot + (stop - unit) * BN) - slot) * SLOT
    base = slots_of(row, place, recent < 0, capacity, ring_slots, num_linear, KV_HEADS)
    if (unit < stop) & (TILES > 0):
        _to_l2(keys_ptr + (base + slot) * D, size, TILES * BN * SLOT)
        _to_l2(values_ptr + (base + slot) * D, size, TILES * BN * SLOT)
    gdc_wait()
