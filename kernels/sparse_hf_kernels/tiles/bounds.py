"""Per tile of query rows, the extreme keys that its rows read; blocks are sorted into full and partial ones by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout, HeadPattern
from sparse_hf_kernels.tiles.geometry import RowGeometry


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """Of each row, key coordinates: near keys `[near, end)`, sinks `[first, sink_end)`; int64, any equal shapes."""

    first: Tensor
    near: Tensor
    end: Tensor
    sink_end: Tensor


@dataclass(frozen=True, kw_only=True)
class TileBounds:
    """Minima and maxima of `RowRange` over the rows of each tile; int64 `[batch or 1, num_tiles]`, never falling."""

    first_min: Tensor
    first_max: Tensor
    near_min: Tensor
    near_max: Tensor
    end_min: Tensor
    end_max: Tensor
    sink_end: Tensor  # of the tile's first sequence; the sinks of later ones lie in the tile's near keys


def row_ranges(
    pattern: HeadPattern, layout: AttentionLayout, start: Tensor, pos: Tensor, seq_end: Tensor | int
) -> RowRange:
    """What rows at `pos` of sequences that begin at `start` read, by the closed form of a pattern."""
    first = torch.maximum(start, pos - layout.max_distance + 1)
    near = torch.maximum(first, pos - pattern.window + 1)
    if pattern.blocks is not None:
        near = first
    if layout.num_dense_rows:
        near = torch.where(pos - start < layout.num_dense_rows, first, near)
    if pattern.num_last_tokens:
        near = torch.where(pos >= seq_end - pattern.num_last_tokens, first, near)
    if layout.causal:
        end = pos + 1
    else:
        reach = pos + min(pattern.window if pattern.blocks is None else layout.max_distance, layout.max_distance)
        end = torch.minimum(reach, torch.as_tensor(seq_end, device=pos.device))
    sink_end = start + (pattern.num_sink_tokens if pattern.blocks is None else 0)
    if not layout.causal:
        # Rows amid the sinks read them all: near keys and sinks are then one range.
        reachable = torch.minimum(sink_end, torch.as_tensor(seq_end, device=pos.device))
        reachable = torch.minimum(reachable, pos + layout.max_distance)
        end = torch.where(near <= sink_end, torch.maximum(end, reachable), end)
    return RowRange(first=first, near=near, end=end, sink_end=sink_end)


def tile_bounds(pattern: HeadPattern, layout: AttentionLayout, geometry: RowGeometry, tile: int) -> TileBounds:
    """Bounds of the tiles of `tile` rows. Key coordinates must be slots."""
    if geometry.is_closed_form:
        return _closed_form_bounds(pattern, layout, geometry, tile)
    assert geometry.q_start is not None and geometry.q_pos is not None and geometry.q_end is not None
    q_len, kv_len = geometry.q_len, geometry.kv_len
    pad = -q_len % tile
    token = F.pad(geometry.q_pos >= 0, (0, pad)).unflatten(1, (-1, tile))
    rows = row_ranges(pattern, layout, geometry.q_start.long(), geometry.q_pos.long(), geometry.q_end.long())

    def extreme(x: Tensor, largest: bool) -> Tensor:
        x = F.pad(x, (0, pad)).unflatten(1, (-1, tile))
        if largest:
            return _never_falling(x.masked_fill(~token, -1).amax(-1), token.any(-1), kv_len)
        return _never_falling(x.masked_fill(~token, 2**40).amin(-1), token.any(-1), kv_len)

    return TileBounds(
        first_min=extreme(rows.first, False),
        first_max=extreme(rows.first, True),
        near_min=extreme(rows.near, False),
        near_max=extreme(rows.near, True),
        end_min=extreme(rows.end, False),
        end_max=extreme(rows.end, True),
        sink_end=extreme(rows.sink_end, False),
    )


def _never_falling(x: Tensor, any_row: Tensor, kv_len: int) -> Tensor:
    """Gives tiles without any token the value of the tile before them, or one past the keys if no token follows.

    Such a tile then reads no key, or a few that masks take away again, and binary search stays possible.
    """
    follows = any_row.flip(-1).cumsum(-1).flip(-1) > 0
    filled = torch.where(any_row, x, torch.where(follows, 0, kv_len))
    return filled.cummax(-1).values


def _closed_form_bounds(pattern: HeadPattern, layout: AttentionLayout, geometry: RowGeometry, tile: int) -> TileBounds:
    begin = torch.arange(0, geometry.q_len, tile, dtype=torch.int64)
    last = (begin + tile).clamp_max(geometry.q_len) - 1
    start = torch.full_like(begin, geometry.start)
    lowest, highest = (
        row_ranges(pattern, layout, start, row + geometry.offset, geometry.kv_len) for row in (begin, last)
    )
    return TileBounds(
        first_min=lowest.first[None],
        first_max=highest.first[None],
        near_min=lowest.near[None],
        near_max=highest.near[None],
        end_min=lowest.end[None],
        end_max=highest.end[None],
        sink_end=lowest.sink_end[None],
    )
