"""Launches of the column kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.scoring.backend import Launch
from sparse_hf_kernels.scoring.columns.kernels import _gather_kernel, _scatter_add_kernel
from sparse_hf_kernels.scoring.geometry import require_contiguous_rows

COLUMNS_PER_PROGRAM = 32


def gather_arguments(k: Tensor, v: Tensor, indices: Tensor, k_out: Tensor, v_out: Tensor) -> Launch:
    """Of `_gather_kernel`, to contiguous outputs `[B, heads, columns, D]`."""
    batch, heads, num_columns = indices.shape
    arguments = (
        k, v, indices, k_out, v_out, num_columns, k.shape[2], heads, heads // k.shape[1],
        *k.stride()[:3], *v.stride()[:3], *indices.stride()[:2],
    )  # fmt: skip
    return (triton.cdiv(num_columns, COLUMNS_PER_PROGRAM), batch * heads), arguments, _options(k.shape[3])


def scatter_arguments(target: Tensor, columns: Tensor, indices: Tensor, member: int) -> Launch:
    """Of `_scatter_add_kernel`, for index head `member` of each group."""
    batch, num_kv_heads, length, dim = target.shape
    num_columns = indices.shape[2]
    arguments = (
        target, columns, indices, member, num_columns, length, num_kv_heads, indices.shape[1] // num_kv_heads,
        *target.stride()[:3], *columns.stride()[:3], *indices.stride()[:2],
    )  # fmt: skip
    return (triton.cdiv(num_columns, COLUMNS_PER_PROGRAM), batch * num_kv_heads), arguments, _options(dim)


def _options(dim: int) -> dict[str, Any]:
    return {"D": dim, "BD": triton.next_power_of_2(dim), "BC": COLUMNS_PER_PROGRAM, "num_warps": 4}


def gather_columns_triton(k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """See `gather_columns`."""
    require_contiguous_rows(k=k, v=v, indices=indices)
    k_out = torch.empty(*indices.shape, k.shape[3], device=k.device, dtype=k.dtype)
    v_out = torch.empty_like(k_out)
    grid, arguments, options = gather_arguments(k, v, indices, k_out, v_out)
    _gather_kernel[grid](*arguments, **options)
    return k_out, v_out


def scatter_add_columns_triton(target: Tensor, columns: Tensor, indices: Tensor) -> None:
    """See `scatter_add_columns`: one launch for each index head of a group, in order."""
    require_contiguous_rows(target=target, columns=columns, indices=indices)
    for member in range(indices.shape[1] // target.shape[1]):
        grid, arguments, options = scatter_arguments(target, columns, indices, member)
        _scatter_add_kernel[grid](*arguments, **options)
