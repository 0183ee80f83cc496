"""Launches of the selection kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.scoring.backend import Launch
from sparse_hf_kernels.scoring.geometry import require_contiguous_rows
from sparse_hf_kernels.scoring.selection.kernels import _lists_to_mask_kernel, _select_kernel, _transpose_kernel

MAX_COLUMNS = 8192
"""Blocks per row that one program holds in registers: 1M tokens of 128."""


def select_arguments(
    scores: Tensor,
    budget: Tensor,
    counts: Tensor,
    indices: Tensor,
    first_block: int,
    keep_sink: bool,
    keep_diagonal: bool,
) -> Launch:
    """Of `_select_kernel`; an integer `budget [Hq]` counts blocks, a floating one is a share of the mass."""
    batch, heads, num_rows, num_cols = scores.shape
    block = max(32, triton.next_power_of_2(num_cols))
    arguments = (scores, budget, counts, indices, num_cols, heads, first_block, *scores.stride()[:3])
    options = {
        "TOP_K": not budget.is_floating_point(),
        "KEEP_SINK": keep_sink,
        "KEEP_DIAGONAL": keep_diagonal,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 512)),
    }
    return (num_rows, batch * heads), arguments, options


def select_triton(
    scores: Tensor, budget: Tensor, first_block: int, keep_sink: bool, keep_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """See `select_top_p` (fp32 `budget [Hq]`) and `select_top_k` (int32)."""
    if scores.shape[3] > MAX_COLUMNS:
        raise ValueError(f"a row may have at most {MAX_COLUMNS} KV blocks, got {scores.shape[3]}; use larger blocks")
    require_contiguous_rows(scores=scores)
    counts = torch.empty(scores.shape[:3], device=scores.device, dtype=torch.int32)
    indices = torch.empty(scores.shape, device=scores.device, dtype=torch.int32)
    grid, arguments, options = select_arguments(scores, budget, counts, indices, first_block, keep_sink, keep_diagonal)
    _select_kernel[grid](*arguments, **options)
    return counts, indices


def mask_arguments(counts: Tensor, indices: Tensor, mask: Tensor) -> Launch:
    """Of `_lists_to_mask_kernel`; `mask [..., rows, cols]` int8, zeroed, all contiguous."""
    slots = indices.shape[-1]
    options = {"BLOCK": min(256, triton.next_power_of_2(slots)), "num_warps": 2}
    return (counts.numel(),), (counts, indices, mask, slots, mask.shape[-1]), options


def transpose_arguments(mask: Tensor, counts: Tensor, indices: Tensor, descending: bool = False) -> Launch:
    """Of `_transpose_kernel`; `counts` and `indices` are those of the columns."""
    batch, heads, num_rows, num_cols = mask.shape
    options = {"BR": 64, "BC": 32, "DESCENDING": descending, "num_warps": 4}
    return (triton.cdiv(num_cols, 32), batch * heads), (mask, counts, indices, num_rows, num_cols), options


def transpose_lists_triton(
    counts: Tensor, indices: Tensor, num_kv_blocks: int, descending: bool
) -> tuple[Tensor, Tensor]:
    """See `transpose_lists`."""
    batch, heads, num_rows = counts.shape
    mask = torch.zeros(batch, heads, num_rows, num_kv_blocks, device=counts.device, dtype=torch.int8)
    out_counts = counts.new_empty(batch, heads, num_kv_blocks)
    out_indices = counts.new_empty(batch, heads, num_kv_blocks, num_rows)
    grid, arguments, options = mask_arguments(counts.contiguous(), indices.contiguous(), mask)
    _lists_to_mask_kernel[grid](*arguments, **options)
    grid, arguments, options = transpose_arguments(mask, out_counts, out_indices, descending)
    _transpose_kernel[grid](*arguments, **options)
    return out_counts, out_indices
