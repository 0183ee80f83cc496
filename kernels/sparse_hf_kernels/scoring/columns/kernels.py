"""Gather of K and V rows by index, and its scatter-add. Entries outside [0, length) are padding."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_columns", "length"])
def _gather_kernel(
    k_ptr, v_ptr, indices_ptr, k_out_ptr, v_out_ptr, num_columns, length, num_heads, group,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ib, stride_ih,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: (column tiles, batch * index heads). Both outputs [batch * heads, num_columns, D], contiguous."""
    pair = tl.program_id(1)
    b = (pair // num_heads).to(tl.int64)
    h = pair % num_heads
    source = (h // group).to(tl.int64)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < num_columns
    rows = tl.load(indices_ptr + b * stride_ib + h.to(tl.int64) * stride_ih + columns, mask=inside, other=-1)
    dims = tl.arange(0, BD)
    fits = (dims < D)[None, :]
    real = ((rows >= 0) & (rows < length))[:, None] & fits
    rows = rows.to(tl.int64)[:, None]
    out = (pair.to(tl.int64) * num_columns + columns)[:, None] * D + dims[None, :]
    k = tl.load(k_ptr + b * stride_kb + source * stride_kh + rows * stride_kn + dims[None, :], mask=real, other=0.0)
    v = tl.load(v_ptr + b * stride_vb + source * stride_vh + rows * stride_vn + dims[None, :], mask=real, other=0.0)
    tl.store(k_out_ptr + out, k, mask=inside[:, None] & fits)
    tl.store(v_out_ptr + out, v, mask=inside[:, None] & fits)


@triton.jit(do_not_specialize=["member", "num_columns", "length"])
def _scatter_add_kernel(
    target_ptr, columns_ptr, indices_ptr, member, num_columns, length, num_kv_heads, group,
    stride_tb, stride_th, stride_tn, stride_cb, stride_ch, stride_cn, stride_ib, stride_ih,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: (column tiles, batch * kv heads). Adds the columns of index head `member` of each group.

    The indices of one head do not repeat, so no two programs of a launch meet and no atomics are needed.
    """
    pair = tl.program_id(1)
    b = (pair // num_kv_heads).to(tl.int64)
    kv_head = (pair % num_kv_heads).to(tl.int64)
    head = kv_head * group + member
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < num_columns
    rows = tl.load(indices_ptr + b * stride_ib + head * stride_ih + columns, mask=inside, other=-1)
    dims = tl.arange(0, BD)
    real = ((rows >= 0) & (rows < length))[:, None] & (dims < D)[None, :]
    source = columns_ptr + b * stride_cb + head * stride_ch
    values = tl.load(source + columns.to(tl.int64)[:, None] * stride_cn + dims[None, :], mask=real, other=0.0)
    target = target_ptr + b * stride_tb + kv_head * stride_th
    target += rows.to(tl.int64)[:, None] * stride_tn + dims[None, :]
    total = tl.load(target, mask=real, other=0.0).to(tl.float32) + values.to(tl.float32)
    tl.store(target, total.to(target_ptr.dtype.element_ty), mask=real)
