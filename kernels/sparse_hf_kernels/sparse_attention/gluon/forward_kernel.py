"""The sparse attention forward kernel for Hopper: a TMA producer warp and two consumer warpgroups.

Structure of FlashAttention-3 (arXiv 2407.08608): the softmax of block i + 1 runs under the P.V product of block i, and
the warpgroups take turns, so that it runs under the other's products too (sections 3.1 and 3.2).
CTAs are persistent and draw tiles from a counter, in the order of the schedule; the producer loads the next tile's
numbers, queries and keys while the consumers finish the last one's output.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_hf_kernels.sparse_attention.gluon.walk import (
    block_at,
    load_row,
    mask_block,
    read_scalar,
    write_scalar,
)

CONSUMERS = gl.constexpr(2)

# Numbers of a tile in shared memory: the row of the table (16), then head, steps, the tile after it.
MESSAGE = gl.constexpr(19)


@gluon.jit
def _read_row(message_s, base):
    """A tile's list offset, piece ends and piece offsets."""
    ends = (
        read_scalar(message_s, base + 2), read_scalar(message_s, base + 3),
        read_scalar(message_s, base + 4), read_scalar(message_s, base + 5),
        read_scalar(message_s, base + 6), read_scalar(message_s, base + 7),
    )  # fmt: skip
    offsets = (
        read_scalar(message_s, base + 8), read_scalar(message_s, base + 9),
        read_scalar(message_s, base + 10), read_scalar(message_s, base + 11),
        read_scalar(message_s, base + 12), read_scalar(message_s, base + 13),
    )  # fmt: skip
    return read_scalar(message_s, base + 1), ends, offsets


@gluon.jit
def _producer(
    descriptors, tiles, barriers, message, walk, counter, num_tiles, num_heads, group, HM: gl.constexpr,
    BN: gl.constexpr, SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr,
):  # fmt: skip
    desc_q, desc_k, desc_v, _desc_o = descriptors
    q_s, k_s, v_s = tiles
    q_full, q_empty, k_full, k_empty, v_full, _turn = barriers
    message_s, told, heard = message
    rows, schedule, lists = walk
    count = 0  # blocks issued so far: ring slot and phase, carried across tiles
    it = 0
    t = gl.program_id(0)
    drawn = t
    while t < num_tiles:
        drawn = gl.atomic_add(counter, 1) + gl.num_programs(0)
        head = gl.load(schedule + 2 * t + 1)
        row_ptr = rows + gl.load(schedule + 2 * t) * 16
        m, at, ends, offsets, _window, _sinks = load_row(row_ptr)
        steps = gl.maximum(ends[5], 1)  # a tile without blocks reads block 0 and masks it
        slot = it % 2
        mbarrier.wait(heard.index(slot), ((it // 2) & 1) ^ 1)
        base = slot * MESSAGE
        for j in gl.static_range(16):
            write_scalar(message_s, base + j, gl.load(row_ptr + j))
        write_scalar(message_s, base + 16, head)
        write_scalar(message_s, base + 17, steps)
        write_scalar(message_s, base + 18, drawn)
        mbarrier.arrive(told.index(slot), count=1)
        b = head // num_heads
        h = head % num_heads
        kv_head = h // group
        listed = (at >= 0) & (ends[5] > 0)
        for j in gl.static_range(CONSUMERS):
            qi = (it % Q_SLOTS) * CONSUMERS + j
            mbarrier.wait(q_empty.index(qi), ((it // Q_SLOTS) & 1) ^ 1)
            mbarrier.expect(q_full.index(qi), desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                desc_q, [b, h, m * (HM * CONSUMERS) + j * HM, 0], q_full.index(qi), q_s.index(qi)
            )
        upcoming = gl.where(ends[5] > 0, block_at(0, listed, lists, at, ends, offsets), 0)
        for i in range(steps):
            block = upcoming
            upcoming = block_at(gl.minimum(i + 1, steps - 1), listed & (i + 1 < steps), lists, at, ends, offsets)
            st = count % SLOTS
            ph = (count // SLOTS) & 1
            mbarrier.wait(k_empty.index(st), ph ^ 1)
            mbarrier.expect(k_full.index(st), desc_k.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_k, [b, kv_head, block * BN, 0], k_full.index(st), k_s.index(st))
            # Values of a block are free when the next one's keys are.
            mbarrier.wait(k_empty.index((count + 1) % SLOTS), (((count + 1) // SLOTS) & 1) ^ 1)
            mbarrier.expect(v_full.index(st), desc_v.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_v, [b, kv_head, block * BN, 0], v_full.index(st), v_s.index(st))
            count += 1
        t = drawn
        it += 1


@gluon.jit
def _masked(
    s, step, message_s, base, lists, num_heads, where, s_l: gl.constexpr, cid: gl.constexpr,
    HM: gl.constexpr, BN: gl.constexpr, SIMPLE: gl.constexpr, CLOSED: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_K_POS: gl.constexpr, LAST: gl.constexpr, ROW_BATCHES: gl.constexpr,
):  # fmt: skip
    """Scores of a partial block with -1e30 where a row may not read the key.

    All that masks need is read here: kept over the unmasked steps, it would cost registers there.
    """
    at, ends, offsets = _read_row(message_s, base)
    if ends[5] > 0:
        row0 = read_scalar(message_s, base) * (HM * CONSUMERS) + cid * HM
        key0 = block_at(step, at >= 0, lists, at, ends, offsets) * BN
        b = 0
        if ROW_BATCHES:
            b = read_scalar(message_s, base + 16) // num_heads
        s = mask_block(
            s, row0 + gl.arange(0, HM, layout=gl.SliceLayout(1, s_l)),
            key0 + gl.arange(0, BN, layout=gl.SliceLayout(0, s_l)), row0, key0, HM, BN, b, where,
            read_scalar(message_s, base + 14), read_scalar(message_s, base + 15), 0, SIMPLE, CLOSED, CAUSAL,
            HAS_K_POS, LAST,
        )  # fmt: skip
    else:  # a tile without blocks
        s = gl.full_like(s, -1.0e30)
    return s


@gluon.jit
def _start_softmax(s, scale):
    """Row maxima in base 2, sums and weights of the first block."""
    # The maxima stay above any hidden score, so that rows without key have weights of 0.
    m_i = gl.maximum(gl.max(s, 1) * scale, -1.0e20)
    p = gl.exp2(s * scale - m_i[:, None])
    return m_i, gl.sum(p, 1), p


@gluon.jit
def _close_rows(
    m_i, l_i, rows, head, num_heads, lse, q_len, q_pos, row_o: gl.constexpr, CLOSED: gl.constexpr,
    ROW_BATCHES: gl.constexpr,
):  # fmt: skip
    """Writes the log-sum-exp; returns what the output is multiplied with, 0 for rows that have no key."""
    some = l_i != 0  # `!=`, so that NaN stays NaN
    if not CLOSED:  # rows without token took part in full blocks
        at = rows
        if ROW_BATCHES:
            at += head // num_heads * q_len
        some = some & (gl.load(q_pos + at, mask=rows < q_len, other=-1) >= 0)
    stat = gl.where(some, (m_i + gl.log2(l_i)) * 0.6931471805599453, float("-inf"))
    gl.store(lse + head.to(gl.int64) * q_len + rows, stat, mask=rows < q_len)
    return gl.convert_layout(gl.where(some, 1.0 / l_i, 0.0), row_o)


@gluon.jit
def _first_scores(q_t, k_s, k_full, k_empty, count, zero, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr):
    st = count % SLOTS
    mbarrier.wait(k_full.index(st), (count // SLOTS) & 1)
    s_t = warpgroup_mma(q_t, k_s.index(st).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s_t,))
    mbarrier.arrive(k_empty.index(st), count=1)
    return s


@gluon.jit
def _step(
    i, acc, pb, m_i, l_i, q_t, tiles, barriers, count, turns, message_s, base, lists, num_heads, scale, where, zero,
    s_l: gl.constexpr, p_l: gl.constexpr, row_o: gl.constexpr, cid: gl.constexpr, MASKED: gl.constexpr,
    SIMPLE: gl.constexpr, CLOSED: gl.constexpr, CAUSAL: gl.constexpr, HAS_K_POS: gl.constexpr, LAST: gl.constexpr,
    ROW_BATCHES: gl.constexpr, HM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Scores of block i under the product of block i - 1's weights and values, then the softmax of block i.

    Every arrival on a barrier makes the warps wait for each other: one tells both the keys and the last values free.
    """
    _q_s, k_s, v_s = tiles
    _q_full, _q_empty, k_full, k_empty, v_full, turn = barriers
    st = count % SLOTS
    prev = (count - 1) % SLOTS
    mbarrier.wait(k_full.index(st), (count // SLOTS) & 1)
    mbarrier.wait(turn.index(cid), turns & 1)
    k_t = k_s.index(st).reshape([BN, D]).permute((1, 0))
    s_t = warpgroup_mma(q_t, k_t, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(prev), ((count - 1) // SLOTS) & 1)
    a_t = warpgroup_mma(pb, v_s.index(prev).reshape([BN, D]), acc, is_async=True)
    mbarrier.arrive(turn.index(1 - cid), count=1)
    s = warpgroup_mma_wait(1, deps=(s_t,))
    if MASKED:
        s = _masked(
            s, i, message_s, base, lists, num_heads, where, s_l, cid, HM, BN, SIMPLE, CLOSED, CAUSAL, HAS_K_POS, LAST,
            ROW_BATCHES,
        )  # fmt: skip
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_i = l_i * alpha + gl.sum(p, 1)
    # pb is an operand in registers: it must outlive the product (ptxas before 13.3 reuses it otherwise).
    acc, pb = warpgroup_mma_wait(0, deps=(a_t, pb))
    mbarrier.arrive(k_empty.index(st), count=1)
    acc = acc * gl.convert_layout(alpha, row_o)[:, None]
    return acc, gl.convert_layout(p.to(pb.dtype), p_l), m_new, l_i


@gluon.jit
def _consumer(
    cid: gl.constexpr, desc_o, tiles, barriers, message, lists, num_tiles, num_heads, lse, scale, where,
    SIMPLE: gl.constexpr, CLOSED: gl.constexpr, CAUSAL: gl.constexpr, HAS_K_POS: gl.constexpr, LAST: gl.constexpr,
    ROW_BATCHES: gl.constexpr, HM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    Q_SLOTS: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s = tiles
    q_full, q_empty, k_full, k_empty, v_full, turn = barriers
    message_s, told, heard = message
    q_len, _kv_len, _offset, _start, _q_start, q_pos, _q_end, _k_pos, _max_distance, _num_dense_rows, _num_last = where
    dtype: gl.constexpr = desc_o.dtype
    s_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_l, k_width=2)
    row_s: gl.constexpr = gl.SliceLayout(1, s_l)
    row_o: gl.constexpr = gl.SliceLayout(1, o_l)
    zero = gl.zeros([HM, BN], gl.float32, s_l)
    turns = 0  # the warpgroups give work to the tensor cores in turn: one's softmax runs under the other's products
    if cid == 1:
        mbarrier.arrive(turn.index(0), count=1)
    count = 0
    it = 0
    t = gl.program_id(0)
    while t < num_tiles:
        base = (it % 2) * MESSAGE
        mbarrier.wait(told.index(it % 2), (it // 2) & 1)
        steps = read_scalar(message_s, base + 17)
        full = read_scalar(message_s, base + 3)
        qi = (it % Q_SLOTS) * CONSUMERS + cid
        q_t = q_s.index(qi).reshape([HM, D])
        mbarrier.wait(q_full.index(qi), (it // Q_SLOTS) & 1)
        s = _first_scores(q_t, k_s, k_full, k_empty, count, zero, BN, D, SLOTS)
        if Q_SLOTS == 2:
            if it > 0:
                # The last tile's output has left its buffer by now; the producer may fill it again.
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(((it - 1) % Q_SLOTS) * CONSUMERS + cid), count=1)
        if full <= 0:
            s = _masked(
                s, 0, message_s, base, lists, num_heads, where, s_l, cid, HM, BN, SIMPLE, CLOSED, CAUSAL,
                HAS_K_POS, LAST, ROW_BATCHES,
            )  # fmt: skip
        m_i, l_i, p = _start_softmax(s, scale)
        pb = gl.convert_layout(p.to(dtype), p_l)
        acc = gl.zeros([HM, D], gl.float32, o_l)
        count += 1
        for i in range(1, gl.minimum(full, steps)):
            acc, pb, m_i, l_i = _step(
                i, acc, pb, m_i, l_i, q_t, tiles, barriers, count, turns, message_s, base, lists, num_heads, scale,
                where, zero, s_l, p_l, row_o, cid, False, SIMPLE, CLOSED, CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, HM, BN,
                D, SLOTS,
            )  # fmt: skip
            turns += 1
            count += 1
        for i in range(gl.maximum(full, 1), steps):
            acc, pb, m_i, l_i = _step(
                i, acc, pb, m_i, l_i, q_t, tiles, barriers, count, turns, message_s, base, lists, num_heads, scale,
                where, zero, s_l, p_l, row_o, cid, True, SIMPLE, CLOSED, CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, HM, BN,
                D, SLOTS,
            )  # fmt: skip
            turns += 1
            count += 1
        prev = (count - 1) % SLOTS
        mbarrier.wait(v_full.index(prev), ((count - 1) // SLOTS) & 1)
        a_t = warpgroup_mma(pb, v_s.index(prev).reshape([BN, D]), acc, is_async=True)
        head = read_scalar(message_s, base + 16)
        row0 = read_scalar(message_s, base) * (HM * CONSUMERS) + cid * HM
        t = read_scalar(message_s, base + 18)
        mbarrier.arrive(heard.index(it % 2), count=1)
        factor = _close_rows(
            m_i, l_i, row0 + gl.arange(0, HM, layout=row_s), head, num_heads, lse, q_len, q_pos, row_o, CLOSED,
            ROW_BATCHES,
        )  # fmt: skip
        acc, pb = warpgroup_mma_wait(0, deps=(a_t, pb))
        # The output leaves through the queries' buffer; TMA cuts off rows past q_len.
        q_t.store(gl.where(factor[:, None] != 0, acc * factor[:, None], 0.0).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(desc_o, [head // num_heads, head % num_heads, row0, 0], q_s.index(qi))
        if Q_SLOTS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(qi), count=1)
        it += 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "q_len", "kv_len", "offset", "start", "max_distance", "num_dense_rows", "num_last",
    ]
)  # fmt: skip
def attention_forward_kernel(
    desc_q, desc_k, desc_v, desc_o, rows, schedule, lists, counter, num_tiles, num_heads, group, lse, scale, q_len,
    kv_len, offset, start, q_start, q_pos, q_end, k_pos, max_distance, num_dense_rows, num_last, SIMPLE: gl.constexpr,
    CLOSED: gl.constexpr, CAUSAL: gl.constexpr, HAS_K_POS: gl.constexpr, LAST: gl.constexpr, ROW_BATCHES: gl.constexpr,
    HM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr,
    Q_SLOTS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """q, o tiles of `CONSUMERS * HM` rows; k, v blocks of BN keys; `lse` natural, fp32 `[batch * heads, q_len]`."""
    dtype: gl.constexpr = desc_q.dtype
    tiles = (
        gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, 1, 1, HM, D], desc_q.layout),
        gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BN, D], desc_k.layout),
        gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BN, D], desc_v.layout),
    )
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    message_s = gl.allocate_shared_memory(gl.int32, [2 * MESSAGE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for j in gl.static_range(Q_SLOTS * CONSUMERS):
        mbarrier.init(q_full.index(j), count=1)
        mbarrier.init(q_empty.index(j), count=1)
    for j in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(k_empty.index(j), count=CONSUMERS)
        mbarrier.init(v_full.index(j), count=1)
    for j in gl.static_range(2):
        mbarrier.init(told.index(j), count=1)
        mbarrier.init(turn.index(j), count=1)
        mbarrier.init(heard.index(j), count=CONSUMERS)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, turn)
    message = (message_s, told, heard)
    descriptors = (desc_q, desc_k, desc_v, desc_o)
    walk = (rows, schedule, lists)
    where = (q_len, kv_len, offset, start, q_start, q_pos, q_end, k_pos, max_distance, num_dense_rows, num_last)
    gl.warp_specialize([
        (_consumer, (0, desc_o, tiles, barriers, message, lists, num_tiles, num_heads, lse, scale, where, SIMPLE,
                     CLOSED, CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, HM, BN, D, SLOTS, Q_SLOTS)),
        (_consumer, (1, desc_o, tiles, barriers, message, lists, num_tiles, num_heads, lse, scale, where, SIMPLE,
                     CLOSED, CAUSAL, HAS_K_POS, LAST, ROW_BATCHES, HM, BN, D, SLOTS, Q_SLOTS)),
        (_producer, (descriptors, tiles, barriers, message, walk, counter, num_tiles, num_heads, group, HM, BN, SLOTS,
                     Q_SLOTS)),
    ], [4, 1], [CONSUMER_REGS, PRODUCER_REGS])  # fmt: skip
