"""Backward tiles that were cut in parts for the sake of balance: their dK and dV, added up in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_hf_kernels.tiles import TileTable

ROWS = 32


@triton.jit
def sum_partials_kernel(
    partials, splits, dk, dv, kv_len, num_kv_heads, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    BN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partials fp32 `[slots, 2, BN, D]`; splits int32 `[tiles, 4]`: tile, batch and KV head, first slot, parts."""
    split = splits + 4 * tl.program_id(0)
    head = tl.load(split + 1)
    own = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    at = partials + tl.load(split + 2).to(tl.int64) * (2 * BN * D) + own[:, None] * D + columns[None, :]
    sum_k = tl.zeros([ROWS, D], tl.float32)
    sum_v = tl.zeros([ROWS, D], tl.float32)
    for _ in range(tl.load(split + 3)):
        sum_k += tl.load(at)
        sum_v += tl.load(at + BN * D)
        at += 2 * BN * D
    keys = tl.load(split) * BN + own
    b = (head // num_kv_heads).to(tl.int64)
    h = (head % num_kv_heads).to(tl.int64)
    inside = (keys < kv_len)[:, None]
    keys = keys.to(tl.int64)[:, None]
    tl.store(dk + b * dk_batch + h * dk_head + keys * dk_row + columns[None, :], sum_k.to(dk.dtype.element_ty), inside)
    tl.store(dv + b * dv_batch + h * dv_head + keys * dv_row + columns[None, :], sum_v.to(dv.dtype.element_ty), inside)


def sum_partials(partials: Tensor, table: TileTable, dk: Tensor, dv: Tensor) -> None:
    """Writes the sums of the parts into dk, dv `[batch, num_kv_heads, kv_len, head_dim]`."""
    if table.splits is None or not len(table.splits):
        return
    _, _, columns, head_dim = partials.shape
    sum_partials_kernel[(len(table.splits), columns // ROWS)](
        partials, table.splits, dk, dv, dk.shape[2], dk.shape[1], *dk.stride()[:3], *dv.stride()[:3],
        BN=columns, D=head_dim, ROWS=ROWS,
    )  # fmt: skip
