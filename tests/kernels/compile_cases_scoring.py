"""Every configuration of the scoring kernels as arguments to compile, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.columns.kernels import _gather_kernel, _scatter_add_kernel
from sparse_hf_kernels.scoring.columns.launch import gather_arguments, scatter_arguments
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.scoring.last_q.kernels import _last_q_sums_kernel, _row_lse_kernel
from sparse_hf_kernels.scoring.last_q.launch import last_q_arguments, last_q_tiles
from sparse_hf_kernels.scoring.pooled.kernels import _mean_pool_kernel, _pooled_scores_kernel
from sparse_hf_kernels.scoring.pooled.launch import pool_arguments, scores_arguments
from sparse_hf_kernels.scoring.selection.kernels import _lists_to_mask_kernel, _select_kernel, _transpose_kernel
from sparse_hf_kernels.scoring.selection.launch import mask_arguments, select_arguments, transpose_arguments
from sparse_hf_kernels.scoring.xattention.kernels import (
    _block_lse_pointer_kernel,
    _block_lse_tma_kernel,
    _block_mass_kernel,
)
from sparse_hf_kernels.scoring.xattention.launch import mass_arguments, pointer_arguments, tma_arguments
from sparse_hf_kernels.scoring.xattention.tuning import score_configs
from sparse_hf_kernels.tiles.selected_kernels import _selected_rows_kernel, fill_launch

LENGTH = 8192
Case = tuple[Any, tuple[Any, ...], dict[str, Any], str]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _heads(number: int, dim: int, dtype: torch.dtype) -> Tensor:
    return _empty(1, LENGTH, number, dim, dtype=dtype).transpose(1, 2)


def cases(
    arch: int,
    head_dims: tuple[int, ...] = (64, 128, 256),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
) -> Iterator[Case]:
    """(kernel, arguments, options, label) for `kernel.warmup(*arguments, grid=(1,), **options)`.

    Args:
        arch: 80, 89, 90, 100 or 120.
    """
    for kernel, arguments, options, label in _selection():
        yield kernel, arguments, options, f"sm_{arch} {label}"
    for dim in head_dims:
        for dtype in dtypes:
            for kernel, arguments, options, label in (*_xattention(arch, dim, dtype), *_others(dim, dtype)):
                yield kernel, arguments, options, f"sm_{arch} hd{dim} {str(dtype)[6:]} {label}"


def _xattention(arch: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    q, k = _heads(8, dim, dtype), _heads(2, dim, dtype)
    pointer, tma = score_configs(arch, dtype.itemsize)
    for stride, block in ((16, 128), (16, 64), (8, 128), (4, 128)):
        grid = BlockGrid.of(q, k, block, None)
        lse = _empty(8, LENGTH // stride, grid.num_kv_blocks)
        mass = _empty(1, 8, grid.num_q_blocks, grid.num_kv_blocks)
        label = f"xattention {stride}/{block}"
        _, arguments, options = pointer_arguments(q, k, lse, grid, stride, 0.1, 0, pointer)
        yield _block_lse_pointer_kernel, arguments, options, f"{label} pointer"
        if tma:
            launch = tma_arguments(q, k, lse, grid, stride, 0.1, 0, tma)
            assert launch is not None
            yield _block_lse_tma_kernel, *launch[1:], f"{label} tma"
        yield _block_mass_kernel, *mass_arguments(lse, mass, grid, stride, 0)[1:], f"{label} mass"


def _selection() -> Iterator[Case]:
    integer = torch.int32
    for columns in (32, 1024, 8192):
        shape = (1, 4, 64, columns)
        counts, indices = _empty(*shape[:3], dtype=integer), _empty(*shape, dtype=integer)
        for budget in (_empty(4), _empty(4, dtype=integer)):
            launch = select_arguments(_empty(*shape), budget, counts, indices, 0, True, True)
            yield _select_kernel, *launch[1:], f"select {columns} {budget.dtype}"
        mask = _empty(*shape, dtype=torch.int8)
        yield _lists_to_mask_kernel, *mask_arguments(counts, indices, mask)[1:], f"lists to mask {columns}"
        out = _empty(1, 4, columns, dtype=integer), _empty(1, 4, columns, 64, dtype=integer)
        for descending in (False, True):
            yield _transpose_kernel, *transpose_arguments(mask, *out, descending)[1:], f"transpose {columns}"
    fixed, heads, rows = _empty(2, 64, 16, dtype=integer), _empty(4, dtype=integer), _empty(256, 16, dtype=integer)
    for transposed in (False, True):
        launch = fill_launch(
            _empty(1, 4, 64, dtype=integer), _empty(1, 4, 64, 64, dtype=integer), fixed, heads, rows, 64, size=128,
            tile_m=64, tile_n=128, first_block=0, q_len=8192, list_base=0, transposed=transposed,
        )  # fmt: skip
        yield _selected_rows_kernel, *launch[1:], f"selected rows, transposed {transposed}"


def _others(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    q, k = _heads(8, dim, dtype), _heads(2, dim, dtype)
    pooled = _empty(1, 8, 64, dim), _empty(1, 2, 64, dim), _empty(1, 8, 64, 64)
    yield _mean_pool_kernel, *pool_arguments(q, pooled[0], 128, 0)[1:], "mean pool"
    yield _pooled_scores_kernel, *scores_arguments(*pooled, 0, 0.1)[1:], "pooled scores"
    for last_q in (64, 128):
        lse = _empty(8, 4, last_q_tiles(last_q, dim, dtype.itemsize)["R"])
        vertical, slash = _empty(1, 8, LENGTH), _empty(2, 1, 8, LENGTH)
        rows, sums = last_q_arguments(q[:, :, -last_q:], k, lse, vertical, slash, LENGTH - last_q, 0.1)
        yield _row_lse_kernel, *rows[1:], f"last {last_q} row lse"
        yield _last_q_sums_kernel, *sums[1:], f"last {last_q} sums"
    indices = _empty(1, 8, 512, dtype=torch.int32)
    columns = _empty(1, 8, 512, dim, dtype=dtype)
    yield _gather_kernel, *gather_arguments(k, k, indices, columns, columns)[1:], "gather columns"
    for target in (_empty(1, 2, LENGTH, dim), k):
        yield _scatter_add_kernel, *scatter_arguments(target, columns, indices, 0)[1:], f"scatter {target.dtype}"
