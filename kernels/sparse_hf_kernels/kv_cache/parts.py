"""What programs leave of a head that several of them share, and how they merge it.

A program that merged a whole head would go on reading when all others have ended. So the head's programs merge it
together: its outputs are cut into slices, and each slice takes one way to memory and back. The first of them, which may
share the head before as well, is left out, so that a program merges one head at most: the one that it began amid.

Every output is summed by one program, over parts in the order of their programs, so that results repeat to the bit.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)
"""The maximum over no scores: finite, so that differences stay defined, and below any score."""

FEW, FEW_OUTPUTS = tl.constexpr(16), tl.constexpr(256)
"""Up to so many parts are merged in slices of so many outputs, as few programs are there to take them."""

MANY, MANY_OUTPUTS = tl.constexpr(128), tl.constexpr(32)
"""Else so many are on their way at once, in slices so narrow that they fit in registers."""


@triton.jit
def _place(part, first):
    """Where a program leaves its part: it leaves two at most, of the head that it begins with and of its last one."""
    return part * 2 + (part == first).to(tl.int32)


@triton.jit
def _put(
    top,
    total,
    acc,
    place,
    acc_ptr,
    stat_ptr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Writes a part: maximum and sum of weights `[BG]`, weighted values `[BG, BD]`."""
    g = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    mask = (g < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(acc_ptr + place * (GROUP * D) + g[:, None] * D + dims[None, :], acc, mask=mask)
    tl.store(stat_ptr + place * (2 * GROUP) + g, top, mask=g < GROUP)
    tl.store(stat_ptr + place * (2 * GROUP) + GROUP + g, total, mask=g < GROUP)
    # All warps have, before the program says so.
    tl.debug_barrier()


@triton.jit
def _output(total, acc):
    """0 where there are no weights; NaN stays NaN, which a GPU's plain maximum would drop."""
    return acc / tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)[:, None]


@triton.jit
def _sum_parts(
    acc_ptr, stat_ptr, first, last, g, dims, GROUP: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Sum of weights `[HEADS]` and weighted values `[HEADS, DIMS]` over the parts of programs `first` to `last`."""
    top = tl.full([HEADS], NEVER, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIMS], tl.float32)
    for begin in tl.range(first, last + 1, PARTS, num_stages=1):
        parts = begin + tl.arange(0, PARTS)
        places = _place(parts, first)
        known = (parts <= last)[:, None] & (g < GROUP)[None, :]
        stats = stat_ptr + places[:, None] * (2 * GROUP) + g[None, :]
        spots = places[:, None, None] * (GROUP * D) + g[None, :, None] * D + dims[None, None, :]
        # Past L1, which knows nothing of other multiprocessors. No load waits for another.
        part_acc = tl.load(
            acc_ptr + spots, mask=known[:, :, None] & (dims < D)[None, None, :], other=0.0, cache_modifier=".cg"
        )
        part_top = tl.load(stats, mask=known, other=NEVER, cache_modifier=".cg")
        part_total = tl.load(stats + GROUP, mask=known, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(part_top, 0))
        weights = tl.exp2(part_top - new_top[None, :])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(part_total * weights, 0)
        acc = acc * old[:, None] + tl.sum(part_acc * weights[:, :, None], 0)
        top = new_top
    return total, acc


@triton.jit
def _merge_slices(
    out_ptr, acc_ptr, stat_ptr, counter_ptr, arrived, first, last, index,
    GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """See `merge`; PARTS are read at once, of OUTPUTS: some dimensions of one head, or all of several."""
    DIMS: tl.constexpr = BD if BD < OUTPUTS else OUTPUTS
    HEADS: tl.constexpr = BM if BM < OUTPUTS // DIMS else OUTPUTS // DIMS
    ACROSS: tl.constexpr = (D + DIMS - 1) // DIMS
    SLICES: tl.constexpr = (GROUP + HEADS - 1) // HEADS * ACROSS
    for number in tl.range(index, SLICES, last - first, num_stages=1):
        some_heads = number // ACROSS
        g = some_heads * HEADS + tl.arange(0, HEADS)
        dims = (number - some_heads * ACROSS) * DIMS + tl.arange(0, DIMS)
        while arrived <= last - first:
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        total, acc = _sum_parts(acc_ptr, stat_ptr, first, last, g, dims, GROUP, D, PARTS, HEADS, DIMS)
        mask = (g < GROUP)[:, None] & (dims < D)[None, :]
        tl.store(out_ptr + g[:, None] * D + dims[None, :], _output(total, acc).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge(
    out_ptr, acc_ptr, stat_ptr, counter_ptr, arrived, first, last, index,
    GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What one of the programs after `first` to `last` merges of the head that all of them share, once they have all
    left their parts: slice `index` of its outputs, and every (last - first)-th after it, if there are so many.

    `arrived` of them had when the program looked last; one that has no slice does not wait for the others.
    """
    if last - first < FEW:
        _merge_slices(
            out_ptr, acc_ptr, stat_ptr, counter_ptr, arrived, first, last, index, GROUP, BM, D, BD, FEW, FEW_OUTPUTS
        )
    else:
        _merge_slices(
            out_ptr, acc_ptr, stat_ptr, counter_ptr, arrived, first, last, index, GROUP, BM, D, BD, MANY, MANY_OUTPUTS
        )


@triton.jit
def _write(total, acc, out_ptr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The output of a head that one program has to itself."""
    g = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    mask = (g < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(out_ptr + g[:, None] * D + dims[None, :], _output(total, acc).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def leave(
    top, total, acc, out_ptr, acc_ptr, stat_ptr, counter_ptr, done_ptr, first, last, ends,
    GROUP: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Writes a head that this program has to itself; of one that programs `first` to `last` share leaves a part, and
    says so. Where none WAITS to `merge`, the last one to come does it for all.

    Returns how many of the head's programs have left theirs, and how many programs had ended before this one, where it
    `ends` here and said so; else -1. Both are said at once, as either takes a way to memory and back.
    """
    arrived = tl.zeros([], tl.int32)
    done = tl.full([], -1, tl.int32)
    if first == last:
        _write(total, acc, out_ptr, GROUP, BG, D, BD)
    else:
        _put(top, total, acc, _place(tl.program_id(0), first), acc_ptr, stat_ptr, GROUP, BG, D, BD)
        both = tl.arange(0, 2)
        said = tl.where(both == 0, 1, ends.to(tl.int32))
        before = tl.atomic_add(tl.where(both == 0, counter_ptr, done_ptr), said, sem="acq_rel")
        arrived = tl.sum(tl.where(both == 0, before, 0), 0) + 1
        done = tl.where(ends, tl.sum(tl.where(both == 1, before, 0), 0), -1)
        if not WAITS:
            if arrived > last - first:
                for index in tl.range(0, last - first, num_stages=1):
                    merge(
                        out_ptr, acc_ptr, stat_ptr, counter_ptr, arrived, first, last, index, GROUP, BM, D, BD
                    )  # fmt: skip
    return arrived, done
