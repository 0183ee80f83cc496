"""XAttention scores on the device: a GEMM that keeps one log-sum-exp per (strided row, KV block), then block masses.

Legend: a tile is `STRIDE` consecutive tokens; tile t holds positions [t, t + 1) * STRIDE. The logit of a query tile i
and a key tile j is the sum over r of q[i * STRIDE + STRIDE - 1 - r] . k[j * STRIDE + r], a product of depth
STRIDE * D. WIDTH = block_size / STRIDE tiles make a block. Logarithms are to base 2.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1.0e30)  # finite: -inf minus -inf is NaN


@triton.jit
def _place(pid, num_strips, cols0, STRIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLS: tl.constexpr):
    """Row tile and first column tile of a program.

    Strip s (STRIP row tiles) has cols0 + s * EXTRA column groups. Strips s and num_strips - 1 - s together have the
    same number for every s, so folding the triangle gives a rectangle: one division places a program, nearly none is
    idle. An odd strip in the middle comes last and alone.
    """
    EXTRA: tl.constexpr = STRIP * BM // (BN * COLS)
    per_pair = STRIP * (2 * cols0 + (num_strips - 1) * EXTRA)
    pair = pid // per_pair
    rest = pid % per_pair
    col = rest // STRIP
    high = num_strips - 1 - pair
    high_cols = cols0 + high * EXTRA
    folded = col >= high_cols
    strip = tl.where(folded, pair, high)
    col = tl.where(folded, col - high_cols, col)
    return strip * STRIP + rest % STRIP, col * COLS


@triton.jit
def _store_block_lse(
    acc, lse_ptr, scale, row_tile, col_tile, row0, num_rows, num_blocks,
    WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Stores log2 of the summed weights of each row and block of `acc [BM, BN]`, above the diagonal left out."""
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    acc = tl.where(cols[None, :] <= (row0 + rows)[:, None], acc, MASKED)
    top = tl.max(acc, 1) * scale
    weights = tl.exp2(acc * scale - top[:, None])
    # A block that underflows against the maximum of its row has no mass; its log2 is -inf and its exp2 is 0.
    total = tl.sum(tl.reshape(weights, [BM, BN // WIDTH, WIDTH]), 2)
    blocks = col_tile * (BN // WIDTH) + tl.arange(0, BN // WIDTH)
    pointers = lse_ptr + rows.to(tl.int64)[:, None] * num_blocks + blocks[None, :]
    inside = (rows < num_rows)[:, None] & (blocks < num_blocks)[None, :]
    tl.store(pointers, top[:, None] + tl.log2(total), mask=inside)


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "q_offset",
        "row0",
        "num_rows",
        "num_blocks",
        "num_strips",
        "cols0",
        "stride_lse",
    ]
)
def _block_lse_pointer_kernel(
    q_ptr, k_ptr, lse_ptr, scale, q_len, kv_len, q_offset, row0, num_rows, num_blocks, num_strips, cols0,
    num_heads, group, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_lse,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Any length and offset. Grid: (folded triangle, batch * heads). lse [batch * heads, rows, blocks]."""
    row_tile, col_tile = _place(tl.program_id(0), num_strips, cols0, STRIP, BM, BN, 1)
    if row_tile * BM >= num_rows or col_tile * BN > row0 + row_tile * BM + BM - 1:
        return
    pair = tl.program_id(1)
    b = (pair // num_heads).to(tl.int64)
    h = pair % num_heads
    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    k_ptr += b * stride_kb + (h // group).to(tl.int64) * stride_kh
    dims = tl.arange(0, BK)
    q_first = (row0 + row_tile * BM + tl.arange(0, BM)) * STRIDE - q_offset
    k_first = (col_tile * BN + tl.arange(0, BN)) * STRIDE
    KD: tl.constexpr = (D + BK - 1) // BK
    acc = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, STRIDE * KD):
        phase = step // KD
        d = (step % KD) * BK + dims
        q_rows = q_first + STRIDE - 1 - phase
        k_rows = k_first + phase
        q_mask = ((q_rows >= 0) & (q_rows < q_len))[:, None] & (d < D)[None, :]
        k_mask = (k_rows < kv_len)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + q_rows.to(tl.int64)[:, None] * stride_qn + d[None, :], mask=q_mask, other=0.0)
        k = tl.load(k_ptr + k_rows.to(tl.int64)[:, None] * stride_kn + d[None, :], mask=k_mask, other=0.0)
        acc = tl.dot(q, k.T, acc, input_precision="ieee")
    lse_ptr += pair.to(tl.int64) * stride_lse
    _store_block_lse(acc, lse_ptr, scale, row_tile, col_tile, row0, num_rows, num_blocks, WIDTH, BM, BN)


@triton.jit(do_not_specialize=["q_row0", "row0", "num_rows", "num_blocks", "num_strips", "cols0", "stride_lse"])
def _block_lse_tma_kernel(
    q_desc, k_desc, lse_ptr, scale, q_row0, row0, num_rows, num_blocks, num_strips, cols0,
    num_heads, group, stride_lse,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, COLS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Whole tiles only, through descriptors of [STRIDE, batch, heads, tiles, D]; `q_row0` is q's tile at row 0."""
    row_tile, col_first = _place(tl.program_id(0), num_strips, cols0, STRIP, BM, BN, COLS)
    last = row0 + row_tile * BM + BM - 1
    if row_tile * BM >= num_rows or col_first * BN > last:
        return
    pair = tl.program_id(1)
    b = pair // num_heads
    h = pair % num_heads
    lse_ptr += pair.to(tl.int64) * stride_lse
    KD: tl.constexpr = (D + BK - 1) // BK
    col_end = tl.minimum(col_first + COLS, last // BN + 1)
    for col_tile in tl.range(col_first, col_end, flatten=COLS > 1):
        acc = tl.zeros([BM, BN], tl.float32)
        for step in tl.range(0, STRIDE * KD):
            phase = step // KD
            d = (step % KD) * BK
            q = q_desc.load([STRIDE - 1 - phase, b, h, q_row0 + row_tile * BM, d]).reshape(BM, BK)
            k = k_desc.load([phase, b, h // group, col_tile * BN, d]).reshape(BN, BK)
            acc = tl.dot(q, k.T, acc)
        _store_block_lse(acc, lse_ptr, scale, row_tile, col_tile, row0, num_rows, num_blocks, WIDTH, BM, BN)


@triton.jit(
    do_not_specialize=[
        "row0",
        "first_tile",
        "end_tile",
        "num_rows",
        "num_blocks",
        "num_kv_blocks",
        "stride_lse",
        "stride_mass",
    ]
)
def _block_mass_kernel(
    lse_ptr, mass_ptr, row0, first_tile, end_tile, num_rows, num_blocks, num_kv_blocks, stride_lse, stride_mass,
    WIDTH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, batch * heads). Softmax over each row's blocks, summed over the rows of a query block.

    `row0` is the tile of row 0; tiles outside [first_tile, end_tile) hold no query and count nothing.
    """
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    rows = block * WIDTH + tl.arange(0, WIDTH)
    held = (rows < num_rows) & (row0 + rows >= first_tile) & (row0 + rows < end_tile)
    lse_ptr += pair * stride_lse + rows.to(tl.int64)[:, None] * num_blocks
    visible = (row0 + block * WIDTH) // WIDTH + 1  # blocks up to the diagonal
    top = tl.full([WIDTH], MASKED, tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, visible, BC):
        cols = start + tl.arange(0, BC)
        lse = tl.load(lse_ptr + cols[None, :], mask=held[:, None] & (cols < visible)[None, :], other=MASKED)
        new = tl.maximum(top, tl.max(lse, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(lse - new[:, None]), 1)
        top = new
    norm = tl.where(held, top + tl.log2(total), 0.0)
    mass_ptr += pair * stride_mass + block.to(tl.int64) * num_kv_blocks
    for start in tl.range(0, num_kv_blocks, BC):
        cols = start + tl.arange(0, BC)
        lse = tl.load(lse_ptr + cols[None, :], mask=held[:, None] & (cols < visible)[None, :], other=MASKED)
        tl.store(mass_ptr + cols, tl.sum(tl.exp2(lse - norm[:, None]), 0), mask=cols < num_kv_blocks)
