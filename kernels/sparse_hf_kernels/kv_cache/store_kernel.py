"""New tokens into a layer's storage: all heads, rings and linear ones, in one launch."""

import triton
import triton.language as tl


@triton.jit
def quantized(x, LARGEST: tl.constexpr, ROUNDS: tl.constexpr):
    """Rows x `[n, d]` in fp32 as they are stored, still fp32, and their scales `[n]`."""
    scales = tl.max(tl.abs(x), 1) / LARGEST
    x = x / tl.maximum(scales, 1.2e-38)[:, None]
    if ROUNDS:
        # To the nearest, ties to even, as torch rounds.
        x = (x + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST), scales


@triton.jit(do_not_specialize=["num_new", "seen", "capacity", "ring_slots", "num_linear"])
def _store_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr,
    positions_ptr, lengths_ptr, heads_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_new, seen, capacity, ring_slots, num_linear,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    QUANTIZED: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of new tokens, KV heads, batch). Without positions every row has `seen` tokens before the new ones.

    `positions [batch, num_new]` int64, -1 for padding, and `lengths [batch]` int32, which counts the new tokens.
    """
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = tokens < num_new
    if HAS_POSITIONS:
        positions = tl.load(positions_ptr + row * num_new + tokens, mask=inside, other=-1).to(tl.int32)
        length = tl.load(lengths_ptr + row)
    else:
        positions = tl.where(inside, seen + tokens, -1)
        length = seen + num_new
    recent = tl.load(heads_ptr + head * 4)
    sinks = tl.load(heads_ptr + head * 4 + 1)
    place = tl.load(heads_ptr + head * 4 + 3)
    linear = recent < 0
    first = tl.where(linear, ring_slots + place.to(tl.int64) * capacity, place.to(tl.int64))
    turned = sinks + (positions - sinks) % tl.maximum(recent, 1)
    slots = tl.where(linear | (positions < sinks), positions, turned)
    keep = (positions >= 0) & (linear | (positions < sinks) | (positions >= length - recent))
    keep = keep & (slots < tl.where(linear, capacity, recent + sinks))
    row_slots = ring_slots + num_linear.to(tl.int64) * capacity
    target = row * row_slots + first + slots
    dims = tl.arange(0, BD)
    fits = keep[:, None] & (dims < D)[None, :]
    k_from = k_ptr + row * stride_kb + head.to(tl.int64) * stride_kh + tokens.to(tl.int64)[:, None] * stride_kn
    v_from = v_ptr + row * stride_vb + head.to(tl.int64) * stride_vh + tokens.to(tl.int64)[:, None] * stride_vn
    k = tl.load(k_from + dims[None, :], mask=fits, other=0.0)
    v = tl.load(v_from + dims[None, :], mask=fits, other=0.0)
    if QUANTIZED:
        k, k_scales = quantized(k.to(tl.float32), LARGEST, ROUNDS)
        v, v_scales = quantized(v.to(tl.float32), LARGEST, ROUNDS)
        tl.store(k_scales_ptr + target, k_scales, mask=keep)
        tl.store(v_scales_ptr + target, v_scales, mask=keep)
    tl.store(keys_ptr + target[:, None] * D + dims[None, :], k.to(keys_ptr.dtype.element_ty), mask=fits)
    tl.store(values_ptr + target[:, None] * D + dims[None, :], v.to(values_ptr.dtype.element_ty), mask=fits)
