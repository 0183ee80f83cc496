"""One new token of each row against what its heads keep: split over programs, which merge together what they share.

Every head of every row has its own number of blocks. Laid end to end, they are shared out evenly: program p takes the
p-th share, which may begin and end amid a head. A head within one share is finished there. Of one that is spread over
several, each program leaves its part of the softmax. Once it has left all of its parts, and not before, it waits for
those of the head that it began amid, and merges a slice of them: as no program waits before its last part is left, and
all of them are on the device at once, all parts come. All programs read the lengths; the last one to have done so
counts the new token, so that a captured graph goes on by itself.

A launch may begin while the kernel before it ends (programmatic dependent launch), and waits for that one's end before
it reads anything. To have its first tiles brought into L2 meanwhile was tried on an H200, and cost more than it saved.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_hf_kernels.kv_cache.parts import NEVER, leave, merge
from sparse_hf_kernels.kv_cache.shares import (
    blocks_of,
    holder,
    pick,
    pick_all,
    read_state,
    read_table,
    share_out,
    slots_of,
)
from sparse_hf_kernels.kv_cache.store_kernel import quantized

LARGEST_DISTANCE = tl.constexpr(2**30)
"""From here on `max_distance` is none."""


@triton.jit
def _visit(
    q, top, total, acc, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, slot,
    length, stored, low, sinks, linear, max_distance, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, QUANTIZED: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the softmax, over the BN slots from `slot` on: the maximum `top`, the sum of weights `total`, and the
    sum of weighted values `acc`."""
    places = tl.arange(0, BN)
    dims = tl.arange(0, BD)
    tile = places[:, None] * D + dims[None, :]
    start = (base + slot) * D
    keep = places < BN
    if MASKED:
        slots = slot + places
        # The slots of sinks are their positions, in rings too.
        near = (length - slots < max_distance) | ((linear == 0) & (slots >= sinks))
        keep = (slots < stored) & near & ((linear == 0) | (slots >= low) | (slots < sinks))
        mask = keep[:, None] & (dims < D)[None, :]
        k = tl.load(keys_ptr + start + tile, mask=mask, other=0.0)
        v = tl.load(values_ptr + start + tile, mask=mask, other=0.0)
    elif D == BD:
        k = tl.load(keys_ptr + start + tile)
        v = tl.load(values_ptr + start + tile)
    else:
        k = tl.load(keys_ptr + start + tile, mask=(dims < D)[None, :], other=0.0)
        v = tl.load(values_ptr + start + tile, mask=(dims < D)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
    if QUANTIZED:
        s = s * tl.load(k_scales_ptr + base + slot + places, mask=keep, other=0.0)[None, :]
    if MASKED:
        s = tl.where(keep[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    old = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    total = total * old + tl.sum(p, 1)
    if QUANTIZED:
        p = p * tl.load(v_scales_ptr + base + slot + places, mask=keep, other=0.0)[None, :]
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * old[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _attend_blocks(
    q, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, first, last_clear, last, sink_blocks, low_block,
    length, stored, low, sinks, linear, max_distance, scale,
    BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax over a head's blocks `first` to `last`: maximum, sum of weights, and weighted values.

    Those before `last_clear` are read from end to end: no masks, no addresses but the block's.
    """
    top = tl.full([BG], NEVER, tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    # A loop that is not needed would still set up its loads in flight.
    if first < last_clear:
        for i in tl.range(first, last_clear, num_stages=STAGES):
            top, total, acc = _visit(
                q, top, total, acc, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, i * BN,
                length, stored, low, sinks, linear, max_distance, scale,
                D, BD, BN, QUANTIZED, PRECISION, False,
            )  # fmt: skip
    if last_clear < last:
        for i in tl.range(last_clear, last, num_stages=2):
            slot = tl.where(i < sink_blocks, i, i - sink_blocks + low_block) * BN
            top, total, acc = _visit(
                q, top, total, acc, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, slot,
                length, stored, low, sinks, linear, max_distance, scale,
                D, BD, BN, QUANTIZED, PRECISION, True,
            )  # fmt: skip
    return top, total, acc


@triton.jit
def _attend_new(q, k_new, v_new, top, total, acc, is_valid, scale):
    """The same with the new token, if there is one."""
    s = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    s = tl.where(is_valid, s, float("-inf"))
    new_top = tl.maximum(top, s)
    old = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top)
    return new_top, total * old + p, acc * old[:, None] + p[:, None] * v_new.to(tl.float32)[None, :]


@triton.jit
def _settled(top, total, acc, is_full, is_valid, HAS_VALID: tl.constexpr):
    """The same where no output is to come of it: after a linear head has run out of room nothing right can follow, so
    NaN, no silent number; and a row without a new token gives 0."""
    total = tl.where(is_full, float("nan"), total)
    if HAS_VALID:
        top = tl.where(is_valid, top, NEVER)
        total = tl.where(is_valid, total, 0.0)
        acc = tl.where(is_valid, acc, 0.0)
    return top, total, acc


@triton.jit
def _store_new(
    k_new, v_new, slot, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr,
    D: tl.constexpr, BD: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Keeps the new token in its slot, which this program alone has read."""
    tl.debug_barrier()  # all of its warps have
    dims = tl.arange(0, BD)
    k_kept = k_new.to(tl.float32)
    v_kept = v_new.to(tl.float32)
    if QUANTIZED:
        k_rows, k_scale = quantized(k_kept[None, :], LARGEST, ROUNDS)
        v_rows, v_scale = quantized(v_kept[None, :], LARGEST, ROUNDS)
        k_kept = tl.sum(k_rows, 0)
        v_kept = tl.sum(v_rows, 0)
        tl.store(k_scales_ptr + slot, tl.sum(k_scale, 0))
        tl.store(v_scales_ptr + slot, tl.sum(v_scale, 0))
    tl.store(keys_ptr + slot * D + dims, k_kept.to(keys_ptr.dtype.element_ty), mask=dims < D)
    tl.store(values_ptr + slot * D + dims, v_kept.to(values_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def _count_token(
    state_ptr, counters_ptr, slots, lengths, valid, turn, rows, exists, num_rows, KV_HEADS: tl.constexpr
):  # fmt: skip
    """One more slot, and one more token in each row that has a new one. The heads of a row all write the same.

    The next launch takes the other counters, from 0; those of this one are still waited on.
    """
    tl.store(state_ptr + 1 + rows // KV_HEADS, lengths + valid.to(tl.int32), mask=exists)
    tl.store(state_ptr, slots + 1)
    tl.store(counters_ptr + 2 + (1 - turn) * num_rows + rows, 0, mask=exists)
    tl.store(counters_ptr, 0)
    tl.store(counters_ptr + 1, 1 - turn)


@triton.jit
def _new_slot(length, recent, sinks, linear, capacity, count, BN: tl.constexpr):
    """Where the new token goes, whether it stays, and the block it goes with."""
    turned = sinks + (length - sinks) % tl.maximum(recent, 1)
    pushes = (~linear) & (length >= recent + sinks)
    slot = tl.where(pushes, turned, length)
    stays = tl.where(linear, length < capacity, (recent > 0) | (length < sinks))
    return slot, stays, tl.where(pushes & stays, slot // BN, count - 1)


@triton.jit(do_not_specialize=["capacity", "ring_slots", "num_linear", "num_rows", "num_dense_rows", "max_distance"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, out_ptr,
    state_ptr, valid_ptr, heads_ptr, acc_ptr, stat_ptr, counters_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    capacity, ring_slots, num_linear, num_rows, num_dense_rows, max_distance, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, ROWS: tl.constexpr, MIN_SHARE: tl.constexpr, HEAD_COST: tl.constexpr, BM: tl.constexpr,
    HAS_VALID: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WAITS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. A row is one KV head of one row of the batch; there are `num_rows` <= ROWS.

    `out [batch, num_heads, D]` is contiguous. `scale` includes log2(e). acc, stat and counters: see `Workspace`. WAITS:
    all programs are resident at once; else the last that leaves its part of a head merges the whole head. OVERLAPS: the
    launch may begin before the kernel before it has ended.
    """
    if OVERLAPS:
        gdc_wait()
    pid, programs = tl.program_id(0), tl.num_programs(0)
    rows = tl.arange(0, ROWS)
    exists = rows < num_rows
    all_lengths, all_valid, slots_before, turn = read_state(
        state_ptr, counters_ptr, valid_ptr, rows, exists, KV_HEADS, HAS_VALID
    )
    all_recent, all_sinks, all_windows, all_places = read_table(heads_ptr, rows, exists, KV_HEADS)
    _, _, counts, _ = blocks_of(all_lengths, all_recent, all_sinks, all_windows, num_dense_rows, BN)
    units, ends, unit, stop, share, extra = share_out(counts, exists, HEAD_COST, MIN_SHARE)
    g = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    in_dims = dims < D
    q_mask = (g < GROUP)[:, None] & in_dims[None, :]
    arrivals_ptr = counters_ptr + 2 + turn * num_rows
    done = tl.full([], -1, tl.int32)
    amid_row, amid_first, amid_last, arrived = done, done, done, done
    while unit < stop:
        here = (unit < ends) & (unit >= ends - units)
        row, end, length, recent, sinks, window, place = pick_all(
            rows, ends, all_lengths, all_recent, all_sinks, all_windows, all_places, here
        )
        linear = recent < 0
        sink_blocks, low_block, count, low = blocks_of(length, recent, sinks, window, num_dense_rows, BN)
        begin = end - count  # of its blocks among the units
        first = tl.maximum(unit - begin, 0)
        last = tl.minimum(end, stop) - begin
        if first < last:
            stored = tl.minimum(length, tl.where(linear, capacity, recent + sinks))
            b = (row // KV_HEADS).to(tl.int64)
            head = row % KV_HEADS
            base = slots_of(row, place, linear, capacity, ring_slots, num_linear, KV_HEADS)
            clear = tl.where((low > 0) | (max_distance < LARGEST_DISTANCE), 0, stored // BN)
            last_clear = tl.minimum(tl.maximum(clear, first), last)
            heads = head * GROUP + g
            q = tl.load(q_ptr + b * stride_qb + heads[:, None] * stride_qh + dims[None, :], mask=q_mask, other=0.0)
            # The new token goes with the block whose slot it takes, which nobody else reads, or else with the last one.
            new_slot, stays, owner = _new_slot(length, recent, sinks, linear, capacity, count, BN)
            owned = (owner >= first) & (owner < last)
            new = in_dims & owned
            k_new = tl.load(k_ptr + b * stride_kb + head.to(tl.int64) * stride_kh + dims, mask=new, other=0.0)
            v_new = tl.load(v_ptr + b * stride_vb + head.to(tl.int64) * stride_vh + dims, mask=new, other=0.0)
            top, total, acc = _attend_blocks(
                q, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, first, last_clear, last,
                sink_blocks, low_block, length, stored, low, sinks, linear, max_distance, scale,
                BG, D, BD, BN, QUANTIZED, PRECISION, STAGES,
            )  # fmt: skip
            is_valid = pick(all_valid.to(tl.int32), here) != 0
            if owned:
                top, total, acc = _attend_new(q, k_new, v_new, top, total, acc, is_valid, scale)
                if is_valid & stays:
                    _store_new(
                        k_new, v_new, base + new_slot, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr,
                        D, BD, QUANTIZED, ROUNDS, LARGEST,
                    )  # fmt: skip
            top, total, acc = _settled(top, total, acc, linear & (length > capacity), is_valid, HAS_VALID)
            head_first, head_last = holder(begin, share, extra), holder(end - 1, share, extra)
            came, done = leave(
                top, total, acc, out_ptr + row.to(tl.int64) * (GROUP * D), acc_ptr, stat_ptr, arrivals_ptr + row,
                counters_ptr, head_first, head_last, end >= stop, GROUP, BG, BM, D, BD, WAITS,
            )  # fmt: skip
            if head_first < pid:
                amid_row, amid_first, amid_last, arrived = row, head_first, head_last, came
        unit = end

    if OVERLAPS:
        gdc_launch_dependents()  # its programs take the places of those that have ended
    if done < 0:
        tl.debug_barrier()  # all warps have read the lengths
        done = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if done == programs - 1:  # all programs have
        _count_token(
            state_ptr, counters_ptr, slots_before, all_lengths, all_valid, turn, rows, exists, num_rows, KV_HEADS
        )
    if WAITS & (amid_row >= 0):
        merge(
            out_ptr + amid_row.to(tl.int64) * (GROUP * D), acc_ptr, stat_ptr, arrivals_ptr + amid_row, arrived,
            amid_first, amid_last, pid - amid_first - 1, GROUP, BM, D, BD,
        )  # fmt: skip
