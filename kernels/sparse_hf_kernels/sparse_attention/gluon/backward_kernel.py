"""The sparse attention backward kernel for Hopper: dK and dV per KV tile, dQ in the same pass if wanted.

A CTA owns 128 keys (two consumer warpgroups of 64) and walks the tiles of queries that read them, for each query head
of the group: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ += dS K. The row statistics are the initial
value of the accumulators: S^T starts at -LSE / scale and dP^T at -delta, so that P = exp2(S^T * scale * log2e) and
dS = P * dP^T need no more registers. For dQ the warpgroups exchange dS through shared memory, each computes half of the
columns, and TMA adds them in fp32 (FlashAttention-3, arXiv 2407.08608, section 3.3: the same division of work).
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir as _ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from sparse_hf_kernels.sparse_attention.gluon.walk import (
    block_at,
    load_row,
    mask_block,
    read_scalar,
    write_scalar,
)


@builtin
def tma_reduce_add(desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Asynchronously adds a tile in shared memory to global memory; Gluon 3.6 has the operation but no wrapper."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(_ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def _part(schedule):
    """This CTA's part of a tile: row of the table, head, and first and last + 1 query head of the group."""
    at = schedule + 8 * gl.program_id(0)
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def _steps(schedule, row_ptr, g, g0, g1):
    """The steps [begin, end) of query head g: a part may start and end amid a head's list, or past it."""
    at = schedule + 8 * gl.program_id(0)
    steps = gl.load(row_ptr + 7)
    end = gl.where(g == g1 - 1, gl.minimum(gl.load(at + 5), steps), steps)
    return gl.minimum(gl.where(g == g0, gl.load(at + 4), 0), end), end


@gluon.jit
def _count_steps(schedule, row_ptr, group_stride, g0, g1):
    """The steps of the whole part."""
    total = 0
    for g in range(g0, g1):
        begin, end = _steps(schedule, row_ptr + g * group_stride * 16, g, g0, g1)
        total += end - begin
    return total


@gluon.jit
def _producer(descriptors, tiles, barriers, walk, BM: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr):
    desc_q, desc_do, desc_k, desc_v, desc_stats = descriptors
    q_s, do_s, k_s, v_s, stats_s, which_s = tiles
    kv_full, q_full, q_empty, do_full, do_empty = barriers
    rows, schedule, lists, num_kv_heads, group, group_stride = walk
    row, head, g0, g1 = _part(schedule)
    b = head // num_kv_heads
    kv_head = head % num_kv_heads
    key0 = gl.load(rows + row * 16) * BN
    mbarrier.expect(kv_full.index(0), 2 * desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_k, [b, kv_head, key0, 0], kv_full.index(0), k_s.index(0))
    tma.async_copy_global_to_shared(desc_k, [b, kv_head, key0 + BN // 2, 0], kv_full.index(0), k_s.index(1))
    mbarrier.expect(kv_full.index(1), 2 * desc_v.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_v, [b, kv_head, key0, 0], kv_full.index(1), v_s.index(0))
    tma.async_copy_global_to_shared(desc_v, [b, kv_head, key0 + BN // 2, 0], kv_full.index(1), v_s.index(1))
    count = 0
    for g in range(g0, g1):
        row_ptr = rows + (row + g * group_stride) * 16
        _n, at, ends, offsets, _window, _sinks = load_row(row_ptr)
        h = kv_head * group + g
        begin, end = _steps(schedule, row_ptr, g, g0, g1)
        upcoming = block_at(begin, (at >= 0) & (begin < end), lists, at, ends, offsets)
        for i in range(begin, end):
            m = upcoming
            upcoming = block_at(i + 1, (at >= 0) & (i + 1 < end), lists, at, ends, offsets)
            st = count % SLOTS
            ph = (count // SLOTS) & 1
            mbarrier.wait(q_empty.index(st), ph ^ 1)
            write_scalar(which_s, st, 2 * m + (i >= ends[1]).to(gl.int32))
            mbarrier.arrive(q_full.index(st), count=1)
            mbarrier.expect(q_full.index(st), desc_q.block_type.nbytes + desc_stats.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [b, h, m * BM, 0], q_full.index(st), q_s.index(st))
            tma.async_copy_global_to_shared(desc_stats, [b, h, 0, m * BM], q_full.index(st), stats_s.index(st))
            mbarrier.wait(do_empty.index(st), ph ^ 1)
            mbarrier.expect(do_full.index(st), desc_do.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_do, [b, h, m * BM, 0], do_full.index(st), do_s.index(st))
            count += 1


@gluon.jit
def _dq_writer(desc_dq, dq_s, dq_full, dq_empty, walk, BM: gl.constexpr, HD: gl.constexpr):
    """Adds the consumers' halves of dQ to memory."""
    rows, schedule, lists, num_kv_heads, group, group_stride = walk
    row, head, g0, g1 = _part(schedule)
    b = head // num_kv_heads
    count = 0
    for g in range(g0, g1):
        row_ptr = rows + (row + g * group_stride) * 16
        _n, at, ends, offsets, _window, _sinks = load_row(row_ptr)
        h = (head % num_kv_heads) * group + g
        begin, end = _steps(schedule, row_ptr, g, g0, g1)
        for i in range(begin, end):
            m = block_at(i, at >= 0, lists, at, ends, offsets)
            for c in gl.static_range(2):
                mbarrier.wait(dq_full.index(c), count & 1)
                tma_reduce_add(desc_dq, [b, h, m * BM, c * HD], dq_s.index(c))
            tma.store_wait(0)
            for c in gl.static_range(2):
                mbarrier.arrive(dq_empty.index(c), count=1)
            count += 1


@gluon.jit
def _store(
    dk, dv, slot, partials, desc_dk, desc_dv, v_s, cid: gl.constexpr, b, kv_head, key0, BN: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Writes a tile, through the own half of V, which nobody else reads; or a part of one, as fp32 sums."""
    HN: gl.constexpr = BN // 2
    if slot >= 0:
        o_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        keys = cid * HN + gl.arange(0, HN, layout=gl.SliceLayout(1, o_l))
        at_part = partials + slot.to(gl.int64) * (2 * BN * D)
        spots = keys[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, o_l))[None, :]
        gl.store(at_part + spots, dk)
        gl.store(at_part + BN * D + spots, dv)
    else:
        v_own = v_s.index(cid).reshape([HN, D])
        v_own.store(dv.to(desc_dv.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(desc_dv, [b, kv_head, key0, 0], v_s.index(cid))
        tma.store_wait(0)
        v_own.store(dk.to(desc_dk.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(desc_dk, [b, kv_head, key0, 0], v_s.index(cid))
        tma.store_wait(0)


@gluon.jit
def _consumer(
    cid: gl.constexpr, desc_dk, desc_dv, partials, tiles, exchange, barriers, walk, scale, where,
    SIMPLE: gl.constexpr, CLOSED: gl.constexpr, CAUSAL: gl.constexpr, HAS_K_POS: gl.constexpr, LAST: gl.constexpr,
    ROW_BATCHES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, stats_s, which_s = tiles
    ds_s, dq_s, ds_full, dq_full, dq_empty = exchange
    kv_full, q_full, q_empty, do_full, do_empty = barriers
    rows, schedule, _lists, num_kv_heads, _group, group_stride = walk
    HN: gl.constexpr = BN // 2
    HD: gl.constexpr = D // 2
    dtype: gl.constexpr = desc_dk.dtype
    s_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    q_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HD, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_l, k_width=2)
    columns: gl.constexpr = gl.SliceLayout(0, s_l)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row, head, g0, g1 = _part(schedule)
    b = head // num_kv_heads
    kv_head = head % num_kv_heads
    rb = b
    if not ROW_BATCHES:
        rb = b * 0
    key0 = gl.load(rows + row * 16) * BN + cid * HN
    qk_scale = scale * 1.4426950408889634
    dk = gl.zeros([HN, D], gl.float32, o_l)
    dv = gl.zeros([HN, D], gl.float32, o_l)
    zero = gl.zeros([HN, BM], gl.float32, s_l)
    zero_q = gl.zeros([BM, HD], gl.float32, q_l)
    k_own = k_s.index(cid).reshape([HN, D])
    v_own = v_s.index(cid).reshape([HN, D])
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(kv_full.index(1), 0)
    window = gl.load(rows + row * 16 + 14)
    sinks = gl.load(rows + row * 16 + 15)
    total = _count_steps(schedule, rows + row * 16, group_stride, g0, g1)
    dk_t = warpgroup_mma_init(dk)
    for count in range(total):
        st = count % SLOTS
        ph = (count // SLOTS) & 1
        half = count % 2
        q_t = q_s.index(st).reshape([BM, D])
        do_t = do_s.index(st).reshape([BM, D])
        ds_own = ds_s.index(half * 2 + cid)
        stats = stats_s.index(st)._reinterpret(gl.float32, [2, BM], flat)
        mbarrier.wait(q_full.index(st), ph)
        # Both accumulators are set before the first product: ptxas waits for it if registers change after it.
        s_0 = zero + stats.index(0).load(columns)[None, :]
        which = read_scalar(which_s, st)
        if which % 2 == 1:
            row0 = which // 2 * BM
            s_0 = mask_block(
                s_0, row0 + gl.arange(0, BM, layout=columns), key0 + gl.arange(0, HN, layout=gl.SliceLayout(1, s_l)),
                row0, key0, BM, HN, rb, where, window, sinks, 1, SIMPLE, CLOSED, CAUSAL, HAS_K_POS, LAST,
            )  # fmt: skip
        dp_0 = zero + stats.index(1).load(columns)[None, :]
        mbarrier.wait(do_full.index(st), ph)
        s_t = warpgroup_mma(k_own, q_t.permute((1, 0)), s_0, is_async=True)
        dp_t = warpgroup_mma(v_own, do_t.permute((1, 0)), dp_0, is_async=True)
        # The last step's product for dK ran on until here.
        dk, s = warpgroup_mma_wait(1, deps=(dk_t, s_t))
        if count > 0:
            mbarrier.arrive(q_empty.index((count - 1) % SLOTS), count=1)
        p = gl.exp2(s * qk_scale)
        pb = gl.convert_layout(p.to(dtype), p_l)
        dp = warpgroup_mma_wait(0, deps=(dp_t,))
        dv_t = warpgroup_mma(pb, do_t, dv, is_async=True)
        ds_own.store((p * dp).to(dtype))
        fence_async_shared()
        if WITH_DQ:
            mbarrier.arrive(ds_full.index(half), count=1)
            mbarrier.wait(ds_full.index(half), (count // 2) & 1)
            dq_t = warpgroup_mma(
                ds_s.index(half * 2).permute((1, 0)), k_s.index(0).reshape([HN, D]).slice(cid * HD, HD, 1), zero_q,
                use_acc=False, is_async=True,
            )  # fmt: skip
            dq_t = warpgroup_mma(
                ds_s.index(half * 2 + 1).permute((1, 0)), k_s.index(1).reshape([HN, D]).slice(cid * HD, HD, 1), dq_t,
                is_async=True,
            )  # fmt: skip
            dk_t = warpgroup_mma(ds_own, q_t, dk, is_async=True)
            dv, dq, pb = warpgroup_mma_wait(1, deps=(dv_t, dq_t, pb))
            mbarrier.arrive(do_empty.index(st), count=1)
            mbarrier.wait(dq_empty.index(cid), (count & 1) ^ 1)
            dq_s.index(cid).reshape([BM, HD]).store(dq)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(cid), count=1)
        else:
            dk_t = warpgroup_mma(ds_own, q_t, dk, is_async=True)
            dv, pb = warpgroup_mma_wait(1, deps=(dv_t, pb))
            mbarrier.arrive(do_empty.index(st), count=1)
    dk = warpgroup_mma_wait(0, deps=(dk_t,))
    _store(
        dk * scale, dv, gl.load(schedule + 8 * gl.program_id(0) + 6), partials, desc_dk, desc_dv, v_s, cid, b, kv_head,
        key0, BN, D,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "offset", "start", "max_distance", "num_dense_rows", "num_last", "group_stride",
    ]
)  # fmt: skip
def attention_backward_kernel(
    desc_q, desc_do, desc_k, desc_v, desc_stats, desc_dq, desc_dk, desc_dv, partials, rows, schedule, lists,
    num_kv_heads, group, group_stride, scale, q_len, kv_len, offset, start, q_start, q_pos, q_end, k_pos,
    max_distance, num_dense_rows, num_last, SIMPLE: gl.constexpr, CLOSED: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_K_POS: gl.constexpr, LAST: gl.constexpr, ROW_BATCHES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, WITH_DQ: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """A part of a backward table's tile per CTA; `desc_stats` has what the accumulators start with."""
    dtype: gl.constexpr = desc_q.dtype
    q_s = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BM, D], desc_q.layout)
    do_s = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BM, D], desc_do.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, BN // 2, D], desc_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, BN // 2, D], desc_v.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, 1, 2, BM], desc_stats.layout)
    which_s = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ds_s = gl.allocate_shared_memory(dtype, [4, BN // 2, BM], ds_layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 1, 1, BM, D // 2], desc_dq.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    do_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    do_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    for j in gl.static_range(2):
        mbarrier.init(kv_full.index(j), count=1)
        mbarrier.init(ds_full.index(j), count=2)
        mbarrier.init(dq_full.index(j), count=1)
        mbarrier.init(dq_empty.index(j), count=1)
    for j in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(j), count=2)  # the tile's number, and its bytes
        mbarrier.init(q_empty.index(j), count=2)
        mbarrier.init(do_full.index(j), count=1)
        mbarrier.init(do_empty.index(j), count=2)
    fence_async_shared()
    walk = (rows, schedule, lists, num_kv_heads, group, group_stride)
    where = (q_len, kv_len, offset, start, q_start, q_pos, q_end, k_pos, max_distance, num_dense_rows, num_last)
    tiles = (q_s, do_s, k_s, v_s, stats_s, which_s)
    barriers = (kv_full, q_full, q_empty, do_full, do_empty)
    exchange = (ds_s, dq_s, ds_full, dq_full, dq_empty)
    descriptors = (desc_q, desc_do, desc_k, desc_v, desc_stats)
    if WITH_DQ:
        gl.warp_specialize([
            (_consumer, (0, desc_dk, desc_dv, partials, tiles, exchange, barriers, walk, scale, where, SIMPLE, CLOSED,
                         CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, BM, BN, D, SLOTS, WITH_DQ)),
            (_consumer, (1, desc_dk, desc_dv, partials, tiles, exchange, barriers, walk, scale, where, SIMPLE, CLOSED,
                         CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, BM, BN, D, SLOTS, WITH_DQ)),
            (_producer, (descriptors, tiles, barriers, walk, BM, BN, SLOTS)),
            (_dq_writer, (desc_dq, dq_s, dq_full, dq_empty, walk, BM, D // 2)),
        ], [4, 1, 1], [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (0, desc_dk, desc_dv, partials, tiles, exchange, barriers, walk, scale, where, SIMPLE, CLOSED,
                         CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, BM, BN, D, SLOTS, WITH_DQ)),
            (_consumer, (1, desc_dk, desc_dv, partials, tiles, exchange, barriers, walk, scale, where, SIMPLE, CLOSED,
                         CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, BM, BN, D, SLOTS, WITH_DQ)),
            (_producer, (descriptors, tiles, barriers, walk, BM, BN, SLOTS)),
        ], [4, 1], [CONSUMER_REGS, PRODUCER_REGS])  # fmt: skip
