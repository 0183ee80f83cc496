"""Block patterns, and windows with dense last rows, as lists of tiles, full ones first, for both directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.blocks import BlockRule
from sparse_hf_kernels.layout import AttentionLayout, HeadPattern
from sparse_hf_kernels.tiles.bounds import TileBounds, row_ranges
from sparse_hf_kernels.tiles.geometry import RowGeometry


@dataclass(frozen=True, kw_only=True)
class TileLists:
    """For each tile the blocks that it visits, in compressed sparse rows.

    Args:
        row_ptr: int64 `[batch or 1, num_tiles]` offsets into `indices`.
        num_full, num_blocks: int64, same shape; the first `num_full` of a tile's `num_blocks` need no mask.
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
    device: torch.device,
) -> TileLists:
    """The lists of query tiles (or, transposed, of KV tiles) under a block pattern, for closed-form geometry.

    Made on `device`: a mask of a thousand by a thousand blocks takes a CPU long, when each head has its own.

    Raises:
        ValueError: if the rows are not in closed form or do not begin at position 0.
    """
    assert pattern.blocks is not None
    if not geometry.is_closed_form or geometry.start != 0:
        raise ValueError("block lists become tile lists only for unpadded sequences that begin at position 0")
    visited, full, exact = _tile_status(pattern.blocks, layout, bounds, geometry, tile_m, tile_n, device)
    return _listed(visited[None], full[None], transposed, exact)


def last_row_lists(
    pattern: HeadPattern, layout: AttentionLayout, geometry: RowGeometry, tile_m: int, tile_n: int, *, transposed: bool,
    device: torch.device,
) -> TileLists:  # fmt: skip
    """The same for a window whose last rows are dense: what tiles read is then no range that moves on with them.

    Key coordinates must be slots.
    """
    q_len = geometry.q_len
    if geometry.q_pos is None or geometry.q_start is None or geometry.q_end is None:
        pos = torch.arange(q_len, device=device)[None] + geometry.offset
        start, end = torch.full_like(pos, geometry.start), torch.full_like(pos, geometry.kv_len)
    else:
        pos, start, end = geometry.q_pos.long(), geometry.q_start.long(), geometry.q_end.long()
    rows, pad = row_ranges(pattern, layout, start, pos, end), -q_len % tile_m
    token = F.pad(pos >= start, (0, pad)).unflatten(1, (-1, tile_m))

    def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
        """Over the tokens of each tile, `[batch or 1, num_tiles, 1]`; tiles without any read nothing."""
        x = F.pad(x, (0, pad)).unflatten(1, (-1, tile_m))
        return x.masked_fill(~token, 2**40).amin(-1, keepdim=True), x.masked_fill(~token, -1).amax(-1, keepdim=True)

    (first_min, first_max), (near_min, near_max) = extremes(rows.first), extremes(rows.near)
    (end_min, end_max), (sink_min, sink_max) = extremes(rows.end), extremes(rows.sink_end)
    begin = torch.arange(0, geometry.kv_len, tile_n, device=pos.device)
    stop = begin + tile_n
    near = (begin < end_max) & (stop > near_min)
    sinks = (begin < torch.minimum(sink_max, end_max)) & (stop > first_min)
    full = (begin >= near_max) & (stop <= end_min)
    full = full | ((begin >= first_max) & (stop <= torch.minimum(sink_min, end_min)))
    return _listed(near | sinks, full & (stop <= geometry.kv_len), transposed, exact=True)


def _listed(visited: Tensor, full: Tensor, transposed: bool, exact: bool) -> TileLists:
    """Of boolean `[batch or 1, query tiles, KV tiles]`: the full ones of each tile first, each kind ascending."""
    if transposed:
        visited, full = visited.transpose(1, 2), full.transpose(1, 2)
    counts, full = visited.sum(-1), visited & full
    kinds = [kind.flatten(0, 1).nonzero() for kind in (full, visited & ~full)]
    tile, block = torch.cat(kinds).unbind(-1)
    return TileLists(
        row_ptr=(counts.flatten().cumsum(0) - counts.flatten()).view_as(counts),
        num_full=full.sum(-1),
        num_blocks=counts,
        indices=block[tile.argsort(stable=True)].to(torch.int32),
        exact=exact,
    )


def _tile_status(
    blocks: BlockRule, layout: AttentionLayout, bounds: TileBounds, geometry: RowGeometry, tile_m: int, tile_n: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, bool]:  # fmt: skip
    """Which (query tile, KV tile) pairs are visited, which of them are full, and whether tiles never cut a block."""
    size, offset = blocks.block_size, geometry.offset
    first_row = torch.arange(0, geometry.q_len, tile_m, device=device) + offset
    last_row = (first_row + tile_m - 1).clamp_max(geometry.q_len - 1 + offset)
    begin = torch.arange(0, geometry.kv_len, tile_n, device=device)
    end = (begin + tile_n).clamp_max(geometry.kv_len)
    # Blocks that are on within each rectangle of blocks, by a two-dimensional running sum.
    num_blocks = -(-max(geometry.kv_len, geometry.q_len + offset) // size)
    total = F.pad(blocks.block_mask(num_blocks, device).to(torch.int64).cumsum(0).cumsum(1), (1, 0, 1, 0))
    above, below = (first_row // size)[:, None], (last_row // size + 1)[:, None]
    left, right = (begin // size)[None], ((end - 1) // size + 1)[None]
    num_on = total[below, right] - total[above, right] - total[below, left] + total[above, left]
    some, every = num_on > 0, num_on == (below - above) * (right - left)
    if layout.num_dense_rows:
        dense = (first_row < layout.num_dense_rows)[:, None]
        every = every | (last_row < layout.num_dense_rows)[:, None]
        some = some | dense
    first_min, first_max, end_min, end_max = (
        x[0].to(device)[:, None] for x in (bounds.first_min, bounds.first_max, bounds.end_min, bounds.end_max)
    )
    reached = (begin[None] < end_max) & (end[None] > first_min)
    inside = (begin[None] + tile_n <= end_min) & (begin[None] >= first_max)
    inside = inside & (begin + tile_n <= geometry.kv_len)[None]
    visited = some & reached
    return visited, visited & every & inside, not bool((visited & ~every).any())
