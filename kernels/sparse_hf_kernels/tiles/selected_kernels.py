"""Table rows of selected patterns in one launch: a dynamic method pays for them in every layer of every call."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_INTS = tl.constexpr(16)
LARGEST_WINDOW = tl.constexpr(2**30)
TILES_PER_PROGRAM = 64


@triton.jit(do_not_specialize=["num_lines", "num_tiles", "capacity", "first_block", "q_len", "list_base"])
def _selected_rows_kernel(
    counts_ptr, indices_ptr, fixed_ptr, pattern_ptr, rows_ptr, num_heads, num_lines, num_tiles, capacity, first_block,
    q_len, list_base, SIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, batch * heads). Rows `[batch * heads, num_tiles, 16]`; see `tiles.selected` for the rules.

    `pattern_ptr [heads]` is a row of `fixed_ptr [patterns, num_tiles, 16]`, or -1 for selected heads.
    """
    pair = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)[None, :]
    inside = (tile < num_tiles)[:, None]
    pattern = tl.load(pattern_ptr + pair % num_heads)
    per_block: tl.constexpr = SIZE // (TILE_M if TRANSPOSED else TILE_N)
    if TRANSPOSED:
        line = tile * TILE_N // SIZE
        own = line - first_block
        inner = tile * TILE_N - line * SIZE
        seen = per_block - inner // TILE_M
        full = tl.maximum(per_block - (inner + TILE_N - 1 + TILE_M - 1) // TILE_M, 0)
    else:
        line = tile * TILE_M // SIZE
        own = line + first_block
        inner = tile * TILE_M - line * SIZE
        seen = (tl.minimum(inner + TILE_M, q_len - line * SIZE) - 1) // TILE_N + 1
        full = (inner + 1) // TILE_N
    selected = (tile < num_tiles) & (pattern < 0)
    at = pair * num_lines + line
    count = tl.load(counts_ptr + at, mask=selected, other=0)
    end = tl.load(indices_ptr + at * capacity + count - 1, mask=selected & (count > 0), other=0)
    has_own = ((count > 0) & (end == own)).to(tl.int32)
    before = (count - has_own) * per_block
    num_full = (before + has_own * full)[:, None]
    num_blocks = (before + has_own * seen)[:, None]
    list_at = (list_base + at * capacity * per_block).to(tl.int32)[:, None]
    row = tl.where(column < 8, tl.where(column < 4, num_full, num_blocks), 0)
    row = tl.where(column == 0, tile[:, None], tl.where(column == 1, list_at, row))
    row = tl.where(column == 14, LARGEST_WINDOW, row)
    own_row = fixed_ptr + (pattern * num_tiles + tile)[:, None] * ROW_INTS + column
    row = tl.where(pattern < 0, row, tl.load(own_row, mask=inside & (pattern >= 0), other=0))
    tl.store(rows_ptr + (pair * num_tiles + tile)[:, None] * ROW_INTS + column, row, mask=inside)


def fill_rows(
    counts: Tensor, indices: Tensor, fixed: Tensor, pattern_of_head: Tensor, num_tiles: int, **where: Any
) -> Tensor:
    """int32 `[batch * num_heads * num_tiles, 16]` from contiguous lists `[batch, num_heads, num_lines(, capacity)]`.

    Args:
        counts, indices: of a selection, or its transpose, descending.
        fixed: int32 `[patterns, num_tiles, 16]`, rows of the patterns that are not selected.
        pattern_of_head: int32 `[num_heads]`, -1 for selected ones.
        num_tiles: of a head.
        where: see `fill_launch`.
    """
    rows = torch.empty(counts.shape[:2].numel() * num_tiles, 16, dtype=torch.int32, device=counts.device)
    grid, arguments, options = fill_launch(counts, indices, fixed, pattern_of_head, rows, num_tiles, **where)
    with torch.cuda.device_of(counts):
        _selected_rows_kernel[grid](*arguments, **options)
    return rows


def fill_launch(
    counts: Tensor, indices: Tensor, fixed: Tensor, pattern_of_head: Tensor, rows: Tensor, num_tiles: int, *,
    size: int, tile_m: int, tile_n: int, first_block: int, q_len: int, list_base: int, transposed: bool,
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Grid, arguments and options; see `tiles.selected.selected_rows`."""
    batch, num_heads, num_lines = counts.shape
    arguments = (
        counts, indices, fixed, pattern_of_head, rows, num_heads, num_lines, num_tiles, indices.shape[-1],
        first_block, q_len, list_base,
    )  # fmt: skip
    options = dict(SIZE=size, TILE_M=tile_m, TILE_N=tile_n, TRANSPOSED=transposed, BLOCK=TILES_PER_PROGRAM, num_warps=4)
    return (triton.cdiv(num_tiles, TILES_PER_PROGRAM), batch * num_heads), arguments, options
