"""What a decode launch has to do, and which part of it is whose: the blocks of all heads of all rows, laid end to end,
in even shares. Every program reads the lengths and finds its own share; no plan is made before."""

import triton
import triton.language as tl


@triton.jit
def pick(x, here):
    """x where `here` is true, which is one place, from registers."""
    return tl.sum(tl.where(here, x, 0), 0)


@triton.jit
def pick_all(rows, ends, lengths, recent, sinks, windows, places, here):
    """Number of the row that is `here`, where its units end, its length, and its entries of the layout's table."""
    return (
        pick(rows, here), pick(ends, here), pick(lengths, here), pick(recent, here), pick(sinks, here),
        pick(windows, here), pick(places, here).to(tl.int64),
    )  # fmt: skip


@triton.jit
def blocks_of(length, recent, sinks, window, num_dense_rows, BN: tl.constexpr):
    """What the query at `length` visits of a head: blocks of sinks, the first block of the run after them, their total,
    and the first position of its window. A ring is visited from slot 0 on."""
    linear = recent < 0
    low = tl.where(length < num_dense_rows, 0, tl.maximum(length - window + 1, 0))
    low_block = tl.where(linear, low // BN, 0)
    sink_blocks = tl.minimum((sinks + BN - 1) // BN, low_block)
    end = tl.where(linear, length, tl.minimum(length, recent + sinks))
    total = sink_blocks + (end + BN - 1) // BN - low_block
    # The new token needs a program even where nothing is stored yet.
    return sink_blocks, low_block, tl.maximum(total, 1), low


@triton.jit
def read_table(heads_ptr, rows, exists, KV_HEADS: tl.constexpr):
    """The layout's entries of every row; all on their way at once."""
    table = heads_ptr + (rows % KV_HEADS) * 4
    all_recent = tl.load(table, mask=exists, other=0)
    all_sinks = tl.load(table + 1, mask=exists, other=0)
    all_windows = tl.load(table + 2, mask=exists, other=1)
    all_places = tl.load(table + 3, mask=exists, other=0)
    return all_recent, all_sinks, all_windows, all_places


@triton.jit
def read_state(
    state_ptr, counters_ptr, valid_ptr, rows, exists, KV_HEADS: tl.constexpr, HAS_VALID: tl.constexpr
):  # fmt: skip
    """Length and validity of every row, the slots before, and which of the two sets of counters is this launch's."""
    all_lengths = tl.load(state_ptr + 1 + rows // KV_HEADS, mask=exists, other=0)
    slots_before = tl.load(state_ptr)
    turn = tl.load(counters_ptr + 1)
    all_valid = exists
    if HAS_VALID:
        all_valid = tl.load(valid_ptr + rows // KV_HEADS, mask=exists, other=0) != 0
    return all_lengths, all_valid, slots_before, turn


@triton.jit
def share_out(counts, exists, HEAD_COST: tl.constexpr, MIN_SHARE: tl.constexpr):
    """Units of work of every row and where they end, first unit of this program, the end of its units, and how they are
    shared out, see `holder`."""
    pid = tl.program_id(0)
    # A head's first units of work are none: they stand for what beginning with a head takes.
    units = tl.where(exists, counts + HEAD_COST, 0)
    ends = tl.cumsum(units, 0)
    all_units = tl.sum(units, 0)
    even = all_units // tl.num_programs(0)
    share = tl.maximum(even, MIN_SHARE)
    extra = tl.where(even < MIN_SHARE, 0, all_units - even * tl.num_programs(0))
    unit = pid * share + tl.minimum(pid, extra)
    return units, ends, unit, tl.minimum(unit + share + (pid < extra).to(tl.int32), all_units), share, extra


@triton.jit
def holder(unit, share, extra):
    """The program that has a unit of the work: the first `extra` of them have share + 1 units, the others share."""
    return tl.maximum(unit // (share + 1), (unit - extra) // share)


@triton.jit
def slots_of(row, place, linear, capacity, ring_slots, num_linear, KV_HEADS: tl.constexpr):
    """A row's first slot among those of all rows of the batch."""
    row_slots = ring_slots + num_linear.to(tl.int64) * capacity
    return (row // KV_HEADS).to(tl.int64) * row_slots + tl.where(linear, ring_slots + place * capacity, place)
