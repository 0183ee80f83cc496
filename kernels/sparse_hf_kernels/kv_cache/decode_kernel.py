"""One new token of each row against what its heads keep: split over programs, merged by the last to arrive.

Every head of every row has its own number of blocks. Laid end to end, they are shared out evenly: program p takes the
p-th share, which may begin and end amid a head. A head within one share is finished there. Of one that is spread over
several, each program leaves its part of the softmax, and the one that arrives last merges them. All programs read the
lengths; the last one to have done so counts the new token, so that a captured graph goes on by itself.
"""

import triton
import triton.language as tl

from sparse_hf_kernels.kv_cache.store_kernel import quantized

NEVER = tl.constexpr(-1e30)
"""The maximum over no scores: finite, so that differences stay defined, and below any score."""

LARGEST_DISTANCE = tl.constexpr(2**30)
"""From here on `max_distance` is none."""


@triton.jit
def _pick(x, rows, row):
    """x[row], from registers."""
    return tl.sum(tl.where(rows == row, x, 0), 0)


@triton.jit
def _blocks(length, recent, sinks, window, num_dense_rows, BN: tl.constexpr):
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
    q, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, first, last, sink_blocks, low_block,
    length, stored, low, sinks, linear, max_distance, scale,
    BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax over a head's blocks `first` to `last`: maximum, sum of weights, and weighted values."""
    top = tl.full([BG], NEVER, tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    # Blocks that are read from end to end: no masks, no addresses but the block's.
    far = max_distance < LARGEST_DISTANCE
    clear = tl.where((low > 0) | far, 0, stored // BN)
    last_clear = tl.minimum(tl.maximum(clear, first), last)
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
def _merge(
    acc_ptr, stat_ptr, first, last, HEADS: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """What programs `first` to `last` left of a row, summed: accumulator `[BG, BD]` and sum of weights `[BG]`."""
    g = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    top = tl.full([BG], NEVER, tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    fits = (g < HEADS)[:, None] & (dims < D)[None, :]
    for begin in tl.range(first, last + 1, PARTS, num_stages=1):
        parts = begin + tl.arange(0, PARTS)
        real = parts <= last
        # A program leaves two parts at most: of the head that it begins with, and of the one that it ends with.
        places = parts * 2 + (parts == first).to(tl.int32)
        stats = stat_ptr + places[:, None] * (2 * HEADS) + g[None, :]
        known = real[:, None] & (g < HEADS)[None, :]
        part_top = tl.load(stats, mask=known, other=NEVER, cache_modifier=".cg")
        part_total = tl.load(stats + HEADS, mask=known, other=0.0, cache_modifier=".cg")
        offsets = (places[:, None, None] * HEADS + g[None, :, None]) * D + dims[None, None, :]
        part = tl.load(acc_ptr + offsets, mask=real[:, None, None] & fits[None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(part_top, 0))
        weights = tl.exp2(part_top - new_top[None, :])
        old = tl.exp2(top - new_top)
        acc = acc * old[:, None] + tl.sum(part * weights[:, :, None], 0)
        total = total * old + tl.sum(part_total * weights, 0)
        top = new_top
    return acc, total


@triton.jit
def _divisor(total):
    """A sum of weights, positive where there are none; NaN stays NaN, which a GPU's plain maximum would drop."""
    return tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _leave(
    top, total, acc, out_ptr, acc_ptr, stat_ptr, counter_ptr, is_valid, first, last,
    GROUP: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Writes a row that this program has to itself; of one that programs `first` to `last` share leaves a part, and
    merges all parts if it is the last to come."""
    pid = tl.program_id(0)
    g = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    offsets = g[:, None] * D + dims[None, :]
    mask = (g < GROUP)[:, None] & (dims < D)[None, :]
    if first == last:
        result = tl.where(is_valid, acc / _divisor(total)[:, None], 0.0)
        tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = pid * 2 + (pid == first).to(tl.int32)
        tl.store(acc_ptr + part * (GROUP * D) + offsets, acc, mask=mask)
        tl.store(stat_ptr + part * (2 * GROUP) + g, top, mask=g < GROUP)
        tl.store(stat_ptr + part * (2 * GROUP) + GROUP + g, total, mask=g < GROUP)
        # All of the program's part is out before it says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        if arrived == last - first:
            merged, weight = _merge(acc_ptr, stat_ptr, first, last, GROUP, BM, D, BD, MERGED)
            result = tl.where(is_valid, merged / _divisor(weight)[:, None], 0.0)
            few = tl.arange(0, BM)
            few_mask = (few < GROUP)[:, None] & (dims < D)[None, :]
            few_offsets = few[:, None] * D + dims[None, :]
            tl.store(out_ptr + few_offsets, result.to(out_ptr.dtype.element_ty), mask=few_mask)
            tl.store(counter_ptr, 0)


@triton.jit
def _count_token(state_ptr, valid_ptr, batch, ROWS: tl.constexpr, HAS_VALID: tl.constexpr):
    """One more slot, and one more token in each row that has a new one."""
    rows = tl.arange(0, ROWS)
    exists = rows < batch
    added = tl.full([ROWS], 1, tl.int32)
    if HAS_VALID:
        added = (tl.load(valid_ptr + rows, mask=exists, other=0) != 0).to(tl.int32)
    lengths = tl.load(state_ptr + 1 + rows, mask=exists, other=0)
    tl.store(state_ptr + 1 + rows, lengths + added, mask=exists)
    tl.store(state_ptr, tl.load(state_ptr) + 1)


@triton.jit(do_not_specialize=["capacity", "ring_slots", "num_linear", "num_rows", "num_dense_rows", "max_distance"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, out_ptr,
    state_ptr, valid_ptr, heads_ptr, acc_ptr, stat_ptr, counters_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    capacity, ring_slots, num_linear, num_rows, num_dense_rows, max_distance, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, ROWS: tl.constexpr, MIN_SHARE: tl.constexpr, MERGED: tl.constexpr, BM: tl.constexpr,
    HAS_VALID: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. A row is one KV head of one row of the batch; there are `num_rows` <= ROWS.

    `out [batch, num_heads, D]` is contiguous; `counters [num_rows + 1]` are 0 before and after. `scale` includes
    log2(e). `acc [programs, 2, GROUP, D]` and `stat [programs, 2, 2, GROUP]` are scratch.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    rows = tl.arange(0, ROWS)
    exists = rows < num_rows
    all_lengths = tl.load(state_ptr + 1 + rows // KV_HEADS, mask=exists, other=0)
    table = heads_ptr + (rows % KV_HEADS) * 4
    all_recent = tl.load(table, mask=exists, other=0)
    all_sinks = tl.load(table + 1, mask=exists, other=0)
    all_windows = tl.load(table + 2, mask=exists, other=1)
    all_places = tl.load(table + 3, mask=exists, other=0)
    _all_sinks, _all_firsts, counts, _all_lows = _blocks(
        all_lengths, all_recent, all_sinks, all_windows, num_dense_rows, BN
    )
    counts = tl.where(exists, counts, 0)
    ends = tl.cumsum(counts, 0)
    all_blocks = tl.sum(counts, 0)
    # Said once the lengths are here, which no program reads again, and asked for at the end. The sum is never negative,
    # but has to be known before the addition.
    done = tl.atomic_add(counters_ptr + num_rows, tl.where(all_blocks < 0, 0, 1), sem="relaxed")
    share = tl.maximum((all_blocks + programs - 1) // programs, MIN_SHARE)
    block = pid * share
    stop = tl.minimum(block + share, all_blocks)
    g = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    in_dims = dims < D
    q_mask = (g < GROUP)[:, None] & in_dims[None, :]
    row_slots = ring_slots + num_linear.to(tl.int64) * capacity
    while block < stop:
        row = tl.sum((ends <= block).to(tl.int32), 0)
        end = _pick(ends, rows, row)
        count = _pick(counts, rows, row)
        begin = end - count
        first = block - begin
        last = tl.minimum(count, stop - begin)
        b = (row // KV_HEADS).to(tl.int64)
        head = row % KV_HEADS
        length = _pick(all_lengths, rows, row)
        recent = _pick(all_recent, rows, row)
        sinks = _pick(all_sinks, rows, row)
        window = _pick(all_windows, rows, row)
        place = _pick(all_places, rows, row).to(tl.int64)
        linear = recent < 0
        sink_blocks, low_block, _blocks_again, low = _blocks(length, recent, sinks, window, num_dense_rows, BN)
        stored = tl.minimum(length, tl.where(linear, capacity, recent + sinks))
        base = b * row_slots + tl.where(linear, ring_slots + place * capacity, place)
        heads = head * GROUP + g
        q = tl.load(q_ptr + b * stride_qb + heads[:, None] * stride_qh + dims[None, :], mask=q_mask, other=0.0)
        # The new token goes with the block whose slot it takes, which nobody else reads, or else with the last one.
        turned = sinks + (length - sinks) % tl.maximum(recent, 1)
        pushes = (~linear) & (length >= recent + sinks)
        new_slot = tl.where(pushes, turned, length)
        stays = tl.where(linear, length < capacity, (recent > 0) | (length < sinks))
        owner = tl.where(pushes & stays, new_slot // BN, count - 1)
        owned = (owner >= first) & (owner < last)
        new = in_dims & owned
        k_new = tl.load(k_ptr + b * stride_kb + head.to(tl.int64) * stride_kh + dims, mask=new, other=0.0)
        v_new = tl.load(v_ptr + b * stride_vb + head.to(tl.int64) * stride_vh + dims, mask=new, other=0.0)
        top, total, acc = _attend_blocks(
            q, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, base, first, last, sink_blocks, low_block,
            length, stored, low, sinks, linear, max_distance, scale,
            BG, D, BD, BN, QUANTIZED, PRECISION, STAGES,
        )  # fmt: skip
        is_valid = length >= 0
        if HAS_VALID:
            is_valid = tl.load(valid_ptr + b) != 0
        if owned:
            top, total, acc = _attend_new(q, k_new, v_new, top, total, acc, is_valid, scale)
            if is_valid & stays:
                _store_new(
                    k_new, v_new, base + new_slot, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr,
                    D, BD, QUANTIZED, ROUNDS, LARGEST,
                )  # fmt: skip

        # Where a linear head has no room left, nothing right can follow: no silent number.
        total = tl.where(linear & (length > capacity), float("nan"), total)
        _leave(
            top, total, acc, out_ptr + (b * KV_HEADS + head) * (GROUP * D), acc_ptr, stat_ptr, counters_ptr + row,
            is_valid, begin // share, (end - 1) // share, GROUP, BG, BM, D, BD, MERGED,
        )  # fmt: skip
        block = begin + last

    if done == programs - 1:
        tl.store(counters_ptr + num_rows, 0)
        _count_token(state_ptr, valid_ptr, num_rows // KV_HEADS, ROWS, HAS_VALID)
