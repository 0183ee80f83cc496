"""Launches of the XAttention kernels: row chunks under a memory limit, descriptors where tiles are whole."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.scoring.backend import Launch, arch_of
from sparse_hf_kernels.scoring.geometry import BlockGrid, require_contiguous_rows
from sparse_hf_kernels.scoring.xattention.kernels import (
    _block_lse_pointer_kernel,
    _block_lse_tma_kernel,
    _block_mass_kernel,
)
from sparse_hf_kernels.scoring.xattention.tuning import STRIP, ScoreConfig, score_configs

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

WORKSPACE_BYTES = 2**29
"""Bound on the row sums kept at once (fp32, one per strided row and KV block), unless one strip of rows needs more."""


def tile_descriptor(x: Tensor, stride: int, block_rows: int, block_k: int) -> TensorDescriptor | None:
    """`x [B, H, N, D]` as `[stride, B, H, whole tiles, D]`, or None where TMA cannot read it.

    The dimensions in front of the last two have extent 1 in a block and are dropped by the compiler.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, length, dim = x.shape
    num_tiles = length // stride
    aligned = 16 // x.element_size()
    row = x.stride(2)
    # The stride of a dimension of extent 1 is arbitrary in torch; TMA still checks it.
    outer = [step if size > 1 else row for step, size in zip(x.stride()[:2], (batch, heads), strict=True)]
    if num_tiles == 0 or x.data_ptr() % 16 or any(step % aligned or step <= 0 for step in (*outer, row)):
        return None
    shape = [stride, batch, heads, num_tiles, dim]
    return TensorDescriptor(x, shape, [row, *outer, stride * row, 1], [1, 1, 1, block_rows, block_k])


def _triangle(row0: int, num_rows: int, config: ScoreConfig) -> tuple[int, int, int, int]:
    """Row tiles per strip, strips, column groups of the first strip, and programs of one head."""
    strip = min(STRIP, triton.next_power_of_2(triton.cdiv(num_rows, config.block_m)))
    rows, cols = strip * config.block_m, config.block_n * config.columns
    num_strips = triton.cdiv(num_rows, rows)
    if num_strips > 1 and rows % cols:
        raise ValueError(f"a strip of {rows} rows must be a multiple of {cols} columns, got {config}")
    first = triton.cdiv(row0 + rows, cols)
    extra = rows // cols
    programs = num_strips // 2 * (2 * first + (num_strips - 1) * extra)
    programs += num_strips % 2 * (first + num_strips // 2 * extra)
    return strip, num_strips, first, programs * strip


def pointer_arguments(
    q: Tensor, k: Tensor, lse: Tensor, grid: BlockGrid, stride: int, scale: float, row0: int, config: ScoreConfig
) -> Launch:
    """Of `_block_lse_pointer_kernel`, for the rows of `lse [pairs, rows, blocks]`, the first at tile `row0`."""
    pairs, num_rows, num_blocks = lse.shape
    strip, num_strips, cols0, programs = _triangle(row0, num_rows, config)
    arguments = (
        q, k, lse, scale, grid.q_len, grid.kv_len, grid.q_offset, row0, num_rows, num_blocks, num_strips, cols0,
        q.shape[1], q.shape[1] // k.shape[1], *q.stride()[:3], *k.stride()[:3], lse.stride(0),
    )  # fmt: skip
    return (programs, pairs), arguments, _options(q, grid, stride, strip, config)


def tma_arguments(
    q: Tensor, k: Tensor, lse: Tensor, grid: BlockGrid, stride: int, scale: float, row0: int, config: ScoreConfig
) -> Launch | None:
    """Of `_block_lse_tma_kernel`, for rows whose query tiles are whole; None where TMA cannot read q or k."""
    q_desc = tile_descriptor(q, stride, config.block_m, config.block_k)
    k_desc = tile_descriptor(k, stride, config.block_n, config.block_k)
    if q_desc is None or k_desc is None:
        return None
    pairs, num_rows, num_blocks = lse.shape
    strip, num_strips, cols0, programs = _triangle(row0, num_rows, config)
    arguments = (
        q_desc, k_desc, lse, scale, row0 - grid.q_offset // stride, row0, num_rows, num_blocks, num_strips, cols0,
        q.shape[1], q.shape[1] // k.shape[1], lse.stride(0),
    )  # fmt: skip
    return (programs, pairs), arguments, {**_options(q, grid, stride, strip, config), "COLS": config.columns}


def _options(q: Tensor, grid: BlockGrid, stride: int, strip: int, config: ScoreConfig) -> dict[str, Any]:
    return {
        "STRIDE": stride,
        "D": q.shape[3],
        "WIDTH": grid.block_size // stride,
        "STRIP": strip,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def mass_arguments(lse: Tensor, mass: Tensor, grid: BlockGrid, stride: int, row0: int) -> Launch:
    """Of `_block_mass_kernel`, from all blocks of the rows of `lse` to `mass [B, Hq, blocks, num_kv_blocks]`."""
    pairs, num_rows, num_blocks = lse.shape
    width = grid.block_size // stride
    first, end = grid.q_offset // stride, -(-(grid.q_offset + grid.q_len) // stride)
    arguments = (
        lse, mass, row0, first, end, num_rows, num_blocks, grid.num_kv_blocks, lse.stride(0), mass.stride(1),
    )  # fmt: skip
    columns = min(256, triton.next_power_of_2(grid.num_kv_blocks))
    return (triton.cdiv(num_rows, width), pairs), arguments, {"WIDTH": width, "BC": columns, "num_warps": 4}


def _launch_tma(
    q: Tensor, k: Tensor, lse: Tensor, grid: BlockGrid, stride: int, scale: float, row0: int, config: ScoreConfig
) -> int:
    """Serves the leading rows whose query tiles are whole; returns how many."""
    num_rows = lse.shape[1]
    whole = min(num_rows, (grid.q_offset + grid.q_len) // stride - row0)
    if whole < num_rows:
        whole = whole // config.block_m * config.block_m
    if whole <= 0 or grid.q_offset % stride:
        return 0
    launch = tma_arguments(q, k, lse[:, :whole], grid, stride, scale, row0, config)
    if launch is None:
        return 0
    programs, arguments, options = launch
    _block_lse_tma_kernel[programs](*arguments, **options)
    return whole


def block_mass_triton(
    q: Tensor,
    k: Tensor,
    grid: BlockGrid,
    stride: int,
    scale: float,
    configs: tuple[ScoreConfig, ScoreConfig | None] | None = None,
) -> Tensor:
    """See `xattention_block_mass`; `configs` (pointer, TMA) is for the tuner and the tests."""
    require_contiguous_rows(q=q, k=k)
    pointer, tma = configs or score_configs(arch_of(q.device), q.element_size())
    pairs = q.shape[0] * q.shape[1]
    width = grid.block_size // stride
    log2_scale = scale / stride * math.log2(math.e)
    start = grid.first_block * width
    total = -(-(grid.q_offset + grid.q_len) // stride) - start
    mass = torch.empty(*q.shape[:2], grid.num_q_blocks, grid.num_kv_blocks, device=q.device, dtype=torch.float32)
    unit = STRIP * max(pointer.block_m, tma.block_m if tma else 0)
    chunk = max(WORKSPACE_BYTES // (4 * pairs * grid.num_kv_blocks) // unit, 1) * unit
    for done in range(0, total, chunk):
        row0, num_rows = start + done, min(chunk, total - done)
        lse = mass.new_empty(pairs, num_rows, triton.cdiv(row0 + num_rows, width))
        served = _launch_tma(q, k, lse, grid, stride, log2_scale, row0, tma) if tma else 0
        if served < num_rows:
            programs, arguments, options = pointer_arguments(
                q, k, lse[:, served:], grid, stride, log2_scale, row0 + served, pointer
            )
            _block_lse_pointer_kernel[programs](*arguments, **options)
        programs, arguments, options = mass_arguments(lse, mass[:, :, done // width :], grid, stride, row0)
        _block_mass_kernel[programs](*arguments, **options)
    return mass
