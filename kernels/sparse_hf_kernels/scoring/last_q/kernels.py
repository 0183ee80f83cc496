"""Column and diagonal sums of the last queries' attention, in two passes and without atomics.

The second pass turns a tile of weights [R, BN] so that its diagonals stand in columns. A tile meets BN + R - 1
distances; the BN lowest go to one buffer and the others to a second, so that every entry of either has one writer.
Logarithms are to base 2.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1.0e30)  # finite: -inf minus -inf is NaN


@triton.jit
def _load_rows(x_ptr, rows, end, stride_n, dims, D: tl.constexpr):
    mask = (rows < end)[:, None] & (dims < D)[None, :]
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(
    q, q_ptr, k_ptr, rows, cols, num_rows, end, stride_qn, stride_kn,
    D: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products of R rows and BN keys; `q` holds the whole rows where a step BK covers head_dim."""
    dims = tl.arange(0, BK)
    if BK >= D:
        return tl.dot(q, _load_rows(k_ptr, cols, end, stride_kn, dims, D).T, input_precision="ieee")
    else:
        acc = tl.zeros([R, BN], tl.float32)
        for start in tl.range(0, D, BK):
            part = _load_rows(q_ptr, rows, num_rows, stride_qn, start + dims, D)
            k = _load_rows(k_ptr, cols, end, stride_kn, start + dims, D)
            acc = tl.dot(part, k.T, acc, input_precision="ieee")
        return acc


@triton.jit(do_not_specialize=["num_rows", "position", "kv_len"])
def _row_lse_kernel(
    q_ptr, k_ptr, lse_ptr, scale, num_rows, position, kv_len, span, num_heads, group,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    D: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: (spans of keys, batch * heads). lse [batch * heads, spans, R]: each row over one span of keys."""
    part = tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // num_heads).to(tl.int64)
    h = pair % num_heads
    rows = tl.arange(0, R)
    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    q = _load_rows(q_ptr, rows, num_rows, stride_qn, tl.arange(0, BK), D)
    k_ptr += b * stride_kb + (h // group).to(tl.int64) * stride_kh
    end = tl.minimum((part + 1) * span, kv_len)
    top = tl.full([R], MASKED, tl.float32)
    total = tl.zeros([R], tl.float32)
    for start in tl.range(part * span, end, BN):
        cols = start + tl.arange(0, BN)
        logits = _logits(q, q_ptr, k_ptr, rows, cols, num_rows, end, stride_qn, stride_kn, D, BK, R, BN) * scale
        visible = (cols[None, :] <= (position + rows)[:, None]) & (cols < end)[None, :]
        logits = tl.where(visible, logits, MASKED)
        new = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        top = new
    line = pair.to(tl.int64) * tl.num_programs(0) + part
    tl.store(lse_ptr + line * R + rows, top + tl.log2(total))


@triton.jit(do_not_specialize=["num_rows", "position", "kv_len", "num_parts", "stride_slash"])
def _last_q_sums_kernel(
    q_ptr, k_ptr, lse_ptr, vertical_ptr, slash_ptr, scale, num_rows, position, kv_len, num_heads, group, num_parts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_slash,
    D: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid: (key tiles, batch * heads). vertical [batch * heads, kv_len]; slash [2, batch * heads, kv_len], zeroed.

    Needs R <= BN. The sum of the two slash buffers is the result.
    """
    start = tl.program_id(0) * BN
    pair = tl.program_id(1)
    b = (pair // num_heads).to(tl.int64)
    h = pair % num_heads
    line = pair.to(tl.int64)
    rows = tl.arange(0, R)
    cols = start + tl.arange(0, BN)

    top = tl.full([R], MASKED, tl.float32)
    total = tl.zeros([R], tl.float32)
    for part in tl.range(0, num_parts, BP):
        parts = part + tl.arange(0, BP)
        lse = tl.load(
            lse_ptr + (line * num_parts + parts)[:, None] * R + rows[None, :],
            mask=(parts < num_parts)[:, None],
            other=MASKED,
        )
        new = tl.maximum(top, tl.max(lse, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(lse - new[None, :]), 0)
        top = new
    norm = top + tl.log2(total)

    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    q = _load_rows(q_ptr, rows, num_rows, stride_qn, tl.arange(0, BK), D)
    k_ptr += b * stride_kb + (h // group).to(tl.int64) * stride_kh
    logits = _logits(q, q_ptr, k_ptr, rows, cols, num_rows, kv_len, stride_qn, stride_kn, D, BK, R, BN) * scale
    visible = (cols[None, :] <= (position + rows)[:, None]) & (rows < num_rows)[:, None] & (cols < kv_len)[None, :]
    weights = tl.where(visible, tl.exp2(logits - norm[:, None]), 0.0)
    tl.store(vertical_ptr + line * kv_len + cols, tl.sum(weights, 0), mask=cols < kv_len)

    # Entry e of the turned tile is the distance base + e for rows i <= e, and base + BN + e for the others.
    entries = tl.arange(0, BN)
    source = (BN - 1 - entries)[None, :] + rows[:, None]
    turned = tl.gather(weights, tl.where(source < BN, source, source - BN), 1)
    near = tl.sum(tl.where(source < BN, turned, 0.0), 0)
    far = tl.sum(tl.where(source < BN, 0.0, turned), 0)
    near_distance = position - start - BN + 1 + entries
    far_distance = near_distance + BN
    slash_ptr += line * kv_len
    tl.store(slash_ptr + near_distance, near, mask=(near_distance >= 0) & (near_distance < kv_len))
    slash_ptr += stride_slash
    tl.store(slash_ptr + far_distance, far, mask=(far_distance >= 0) & (far_distance < kv_len))
