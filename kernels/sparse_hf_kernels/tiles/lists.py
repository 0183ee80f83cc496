"""Explicit block lists as lists of tiles, full ones first, for both directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout, BlockList, HeadPattern
from sparse_hf_kernels.tiles.bounds import TileBounds
from sparse_hf_kernels.tiles.geometry import RowGeometry


@dataclass(frozen=True, kw_only=True)
class TileLists:
    """For each tile the blocks that it visits, in compressed sparse rows.

    Args:
        row_ptr: int64 `[num_tiles]` offsets into `indices`.
        num_full, num_blocks: int64 `[num_tiles]`; the first `num_full` of a tile's `num_blocks` need no mask.
        indices: int32 `[entries]`.
        exact: no block needs the element-wise look-up: block borders are tile borders.
    """

    row_ptr: Tensor
    num_full: Tensor
    num_blocks: Tensor
    indices: Tensor
    exact: bool


def tile_lists(
    pattern: HeadPattern,
    layout: AttentionLayout,
    bounds: TileBounds,
    geometry: RowGeometry,
    tile_m: int,
    tile_n: int,
    *,
    transposed: bool,
) -> TileLists:
    """The lists of query tiles (or, transposed, of KV tiles) under an explicit pattern, for closed-form geometry.

    Raises:
        ValueError: if the rows are not in closed form or do not begin at position 0.
    """
    assert pattern.blocks is not None
    if not geometry.is_closed_form or geometry.start != 0:
        raise ValueError("block lists become tile lists only for unpadded sequences that begin at position 0")
    visited, full, exact = _tile_status(pattern.blocks, layout, bounds, geometry, tile_m, tile_n)
    if transposed:
        visited, full = visited.T, full.T
    order = (torch.arange(visited.shape[1]) + visited.shape[1] * (~full)).masked_fill(~visited, 2**40)
    order = order.sort(-1).values  # full ones first, each kind ascending
    counts = visited.sum(-1)
    indices = order[order < 2**40] % visited.shape[1]
    return TileLists(
        row_ptr=counts.cumsum(0) - counts,
        num_full=(visited & full).sum(-1),
        num_blocks=counts,
        indices=indices.to(torch.int32),
        exact=exact,
    )


def _tile_status(
    blocks: BlockList, layout: AttentionLayout, bounds: TileBounds, geometry: RowGeometry, tile_m: int, tile_n: int
) -> tuple[Tensor, Tensor, bool]:
    """Which (query tile, KV tile) pairs are visited, which of them are full, and whether tiles never cut a block."""
    size, offset = blocks.block_size, geometry.offset
    first_row = torch.arange(0, geometry.q_len, tile_m) + offset
    last_row = (first_row + tile_m - 1).clamp_max(geometry.q_len - 1 + offset)
    begin = torch.arange(0, geometry.kv_len, tile_n)
    end = (begin + tile_n).clamp_max(geometry.kv_len)
    # Blocks that are on within each rectangle of blocks, by a two-dimensional running sum.
    total = F.pad(blocks.mask.to(torch.int64).cumsum(0).cumsum(1), (1, 0, 1, 0))
    above, below = (first_row // size)[:, None], (last_row // size + 1)[:, None]
    left, right = (begin // size)[None], ((end - 1) // size + 1)[None]
    num_on = total[below, right] - total[above, right] - total[below, left] + total[above, left]
    some, every = num_on > 0, num_on == (below - above) * (right - left)
    if layout.num_dense_rows:
        dense = (first_row < layout.num_dense_rows)[:, None]
        every = every | (last_row < layout.num_dense_rows)[:, None]
        some = some | dense
    reached = (begin[None] < bounds.end_max[0][:, None]) & (end[None] > bounds.first_min[0][:, None])
    inside = (begin[None] + tile_n <= bounds.end_min[0][:, None]) & (begin[None] >= bounds.first_max[0][:, None])
    inside = inside & (begin + tile_n <= geometry.kv_len)[None]
    visited = some & reached
    return visited, visited & every & inside, not bool((visited & ~every).any())
