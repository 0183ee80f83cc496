"""What programs leave of a head that several of them share, and how the last of them to arrive merges it.

Parts are summed in the order of their programs, whoever comes last, so that results repeat to the bit. A head of very
many parts is merged in two levels: the last of each group of programs leaves the group's, and the last group merges
those. What is read at once fits in registers, and one program's way to memory and back is all that a level takes.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)
"""The maximum over no scores: finite, so that differences stay defined, and below any score."""

MOST_ROUNDS = tl.constexpr(4)
"""Loads one after the other that a level may take before two levels are faster."""


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
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Writes a part: maximum and sum of weights `[ROWS]`, weighted values `[ROWS, BD]`."""
    g = tl.arange(0, ROWS)
    dims = tl.arange(0, BD)
    mask = (g < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(acc_ptr + place * (GROUP * D) + g[:, None] * D + dims[None, :], acc, mask=mask)
    tl.store(stat_ptr + place * (2 * GROUP) + g, top, mask=g < GROUP)
    tl.store(stat_ptr + place * (2 * GROUP) + GROUP + g, total, mask=g < GROUP)
    # All of it is out before the program says so.
    tl.debug_barrier()


@triton.jit
def _merge(
    acc_ptr, stat_ptr, first, begin, end, step, GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The parts of programs `begin`, `begin + step`, ... up to `end`, of a row that begins in program `first`, summed
    in that order: maximum and sum of weights `[BM]`, weighted values `[BM, BD]`.

    MERGED of them are on their way at a time.
    """
    g = tl.arange(0, BM)
    dims = tl.arange(0, BD)
    fits = (g < GROUP)[:, None] & (dims < D)[None, :]
    offsets = g[:, None] * D + dims[None, :]
    top = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for part in tl.range(begin, end + 1, step * MERGED, num_stages=1):
        parts = part + tl.arange(0, MERGED) * step
        real = parts <= end
        places = _place(parts, first)
        known = real[:, None] & (g < GROUP)[None, :]
        stats = stat_ptr + places[:, None] * (2 * GROUP) + g[None, :]
        part_top = tl.load(stats, mask=known, other=NEVER, cache_modifier=".cg")
        part_total = tl.load(stats + GROUP, mask=known, other=0.0, cache_modifier=".cg")
        spots = acc_ptr + places[:, None, None] * (GROUP * D) + offsets[None]
        part_acc = tl.load(spots, mask=real[:, None, None] & fits[None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(part_top, 0))
        weights = tl.exp2(part_top - new_top[None, :])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(part_total * weights, 0)
        acc = acc * old[:, None] + tl.sum(part_acc * weights[:, :, None], 0)
        top = new_top
    return top, total, acc


@triton.jit
def _write(total, acc, is_valid, out_ptr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """A row's output, 0 if its token is none."""
    g = tl.arange(0, ROWS)
    dims = tl.arange(0, BD)
    # Positive where there are no weights; NaN stays NaN, which a GPU's plain maximum would drop.
    divisor = tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    result = tl.where(is_valid, acc / divisor[:, None], 0.0)
    mask = (g < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(out_ptr + g[:, None] * D + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_parts(
    out_ptr, acc_ptr, stat_ptr, counter_ptr, group, is_valid, first, last, begin, end, grouped,
    GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """What the last program of those from `begin` to `end` does: writes the row, or leaves its group's part where the
    group's first program left its own; the last group to come writes the row then."""
    top, total, acc = _merge(acc_ptr, stat_ptr, first, begin, end, 1, GROUP, BM, D, BD, MERGED)
    if not grouped:
        _write(total, acc, is_valid, out_ptr, GROUP, BM, D, BD)
    else:
        tl.debug_barrier()  # all of this program has read what it now writes over
        _put(top, total, acc, _place(group, first), acc_ptr, stat_ptr, GROUP, BM, D, BD)
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == (last - first) // MERGED:
            tl.store(counter_ptr, 0)
            top, total, acc = _merge(acc_ptr, stat_ptr, first, first, last, MERGED, GROUP, BM, D, BD, MERGED)
            _write(total, acc, is_valid, out_ptr, GROUP, BM, D, BD)


@triton.jit
def leave(
    top, total, acc, out_ptr, acc_ptr, stat_ptr, counters_ptr, row, num_rows, is_valid, first, last, ends,
    GROUP: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Writes a row that this program has to itself; of one that programs `first` to `last` share leaves a part, and
    merges parts if it is the last to come.

    Returns how many programs had ended before this one, where it `ends` here and said so; else -1. That it has come
    and that it ends are said at once, as either takes a way to memory and back.
    """
    done = tl.full([], -1, tl.int32)
    if first == last:
        _write(total, acc, is_valid, out_ptr, GROUP, BG, D, BD)
    else:
        pid = tl.program_id(0)
        _put(top, total, acc, _place(pid, first), acc_ptr, stat_ptr, GROUP, BG, D, BD)
        grouped = last - first >= MERGED * MOST_ROUNDS
        group = first + (pid - first) // MERGED * MERGED
        begin = tl.where(grouped, group, first)
        end = tl.where(grouped, tl.minimum(group + MERGED - 1, last), last)
        counter = tl.where(grouped, num_rows + 1 + _place(group, first), row)
        both = tl.arange(0, 2)
        said = tl.where(both == 0, 1, ends.to(tl.int32))
        before = tl.atomic_add(counters_ptr + tl.where(both == 0, counter, num_rows), said, sem="acq_rel")
        done = tl.where(ends, tl.sum(tl.where(both == 1, before, 0), 0), -1)
        if tl.sum(tl.where(both == 0, before, 0), 0) == end - begin:
            tl.store(counters_ptr + counter, 0)
            _merge_parts(
                out_ptr, acc_ptr, stat_ptr, counters_ptr + row, group, is_valid, first, last, begin, end, grouped,
                GROUP, BM, D, BD, MERGED,
            )  # fmt: skip
    return done
