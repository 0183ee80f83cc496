"""The row sums that every fused backward pass starts from."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_hf_kernels.sparse_attention.triton.launch import on_device_of


@triton.jit(do_not_specialize=["q_len"])
def _delta_kernel(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_on, stride_od, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_lb, stride_lh, stride_ln, num_heads, q_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, batch * heads). lse and delta are contiguous `[batch, heads, q_len]`."""
    pair = tl.program_id(1).to(tl.int64)
    b = pair // num_heads
    head = pair % num_heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BLOCK_D)
    far = rows.to(tl.int64)[:, None]
    inside = (rows < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptr += b * stride_ob + head * stride_oh
    grad_ptr += b * stride_gb + head * stride_gh
    out = tl.load(out_ptr + far * stride_on + dims[None, :] * stride_od, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + far * stride_gn + dims[None, :] * stride_gd, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        pointers = grad_lse_ptr + b * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ln
        delta -= tl.load(pointers, mask=rows < q_len, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + pair * q_len + rows, mask=rows < q_len, other=0.0)
    tl.store(delta_ptr + pair * q_len + rows, tl.where(lse == float("-inf"), 0.0, delta), mask=rows < q_len)


def delta(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(grad_out * out) - grad_lse, fp32 `[batch, num_heads, q_len]`; 0 in rows without key.

    Args:
        out, grad_out: `[batch, num_heads, q_len, head_dim]`, any strides.
        lse: fp32 `[batch, num_heads, q_len]`, contiguous, -inf in rows without key, whose `grad_lse` means nothing.
        grad_lse: same shape, any strides, or None.
    """
    batch, num_heads, q_len, head_dim = out.shape
    result = torch.empty(lse.shape, device=lse.device, dtype=torch.float32)
    if result.numel() == 0:
        return result
    block_d = triton.next_power_of_2(head_dim)
    block_m = max(16, 8192 // block_d)
    strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    with on_device_of(out):
        _delta_kernel[(triton.cdiv(q_len, block_m), batch * num_heads)](
            out, grad_out, lse, grad_lse, result, *out.stride(), *grad_out.stride(), *strides, num_heads, q_len,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BM=block_m, num_warps=4,
        )  # fmt: skip
    return result
