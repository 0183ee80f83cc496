"""Mean pooling of blocks and the softmaxed scores between pooled blocks. Logarithms are to base 2."""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1.0e30)  # finite: -inf minus -inf is NaN


@triton.jit(do_not_specialize=["length", "offset"])
def _mean_pool_kernel(
    x_ptr, out_ptr, length, offset, num_heads, stride_b, stride_h, stride_n,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, batch * heads). Block 0 holds position `offset`; out fp32 [batch * heads, blocks, D]."""
    block = tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // num_heads).to(tl.int64)
    h = (pair % num_heads).to(tl.int64)
    x_ptr += b * stride_b + h * stride_h
    dims = tl.arange(0, BD)
    begin = (offset // BLOCK_SIZE + block) * BLOCK_SIZE - offset
    first, end = tl.maximum(begin, 0), tl.minimum(begin + BLOCK_SIZE, length)
    acc = tl.zeros([BR, BD], tl.float32)
    for start in tl.range(0, BLOCK_SIZE, BR):
        rows = begin + start + tl.arange(0, BR)
        mask = ((rows >= first) & (rows < end))[:, None] & (dims < D)[None, :]
        acc += tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    mean = tl.sum(acc, 0) / (end - first).to(tl.float32)
    line = pair.to(tl.int64) * tl.num_programs(0) + block
    tl.store(out_ptr + line * D + dims, mean, mask=dims < D)


@triton.jit
def _pooled_logits(
    q_ptr, k_ptr, rows, cols, num_rows, num_cols, diagonal, scale,
    D: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, D, BK):
        dims = start + tl.arange(0, BK)
        fits = (dims < D)[None, :]
        q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], mask=(rows < num_rows)[:, None] & fits, other=0.0)
        k = tl.load(k_ptr + cols[:, None] * D + dims[None, :], mask=(cols < num_cols)[:, None] & fits, other=0.0)
        # Three TF32 products: near fp32, on the tensor cores.
        acc = tl.dot(q, k.T, acc, input_precision="tf32x3")
    return tl.where(cols[None, :] <= diagonal[:, None], acc * scale, MASKED)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_block"])
def _pooled_scores_kernel(
    q_ptr, k_ptr, out_ptr, scale, num_rows, num_cols, first_block, group,
    D: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, batch * heads). q [batch * heads, rows, D], k [batch * kv heads, cols, D], both contiguous."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    diagonal = tl.minimum(first_block + rows, num_cols - 1)
    held = rows < num_rows
    q_ptr += pair * num_rows * D
    # Batch * heads runs over the query heads; group of them share a KV head.
    k_ptr += (pair // group) * num_cols * D
    out_ptr += pair * num_rows * num_cols
    end = tl.minimum(first_block + (tl.program_id(0) + 1) * BM, num_cols)
    top = tl.full([BM], MASKED, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(0, end, BN):
        cols = start + tl.arange(0, BN)
        logits = _pooled_logits(q_ptr, k_ptr, rows, cols, num_rows, num_cols, diagonal, scale, D, BK, BM, BN)
        new = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        top = new
    norm = top + tl.log2(total)
    pointers = out_ptr + rows.to(tl.int64)[:, None] * num_cols
    for start in tl.range(0, num_cols, BN):
        cols = start + tl.arange(0, BN)
        weights = tl.zeros([BM, BN], tl.float32)
        if start < end:
            logits = _pooled_logits(q_ptr, k_ptr, rows, cols, num_rows, num_cols, diagonal, scale, D, BK, BM, BN)
            weights = tl.exp2(logits - norm[:, None])
        tl.store(pointers + cols[None, :], weights, mask=held[:, None] & (cols < num_cols)[None, :])
