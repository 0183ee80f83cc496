"""Closed-form patterns as a few ranges of blocks per tile: no metadata that grows with the length.

A tile walks step i = 0, 1, ... and visits block `i + offset[k]`, where k is the piece that i falls into. Pieces 0 and 1
hold the full blocks, which need no mask; pieces 2 to 5 the partial ones. A forward tile (query rows) visits KV blocks,
a backward tile (KV rows) visits query blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_hf_kernels.tiles.bounds import TileBounds

NUM_PIECES = 6


def forward_pieces(bounds: TileBounds, block: int, kv_len: int) -> Tensor:
    """For each tile of query rows the KV blocks that it visits: int64 `[batch or 1, num_tiles, 2 * NUM_PIECES]`.

    The last dimension holds the steps at which the pieces end, then the offsets.
    """
    near_begin = (bounds.near_min // block).clamp_min(0)
    near_end = _ceil_div(bounds.end_max.clamp_max(kv_len), block)
    # A block that reaches past the keys needs its mask.
    full_end = bounds.end_min.clamp_max(kv_len) // block
    full_begin, full_end = _inside(_ceil_div(bounds.near_max.clamp_min(0), block), full_end, near_begin, near_end)
    sink_begin = (bounds.first_min // block).clamp_min(0)
    # Sinks too end with the keys, which queries past them do not bound.
    sinks = bounds.sink_end.clamp_max(kv_len)
    sink_end = torch.minimum(_ceil_div(torch.minimum(sinks, bounds.end_max), block), near_begin)
    sink_full_begin, sink_full_end = _inside(
        _ceil_div(bounds.first_max.clamp_min(0), block),
        torch.minimum(sinks, bounds.end_min) // block,
        sink_begin,
        sink_end,
    )
    return _as_pieces(
        (sink_full_begin, sink_full_end),
        (full_begin, full_end),
        (sink_begin, sink_full_begin),
        (sink_full_end, sink_end),
        (near_begin, full_begin),
        (full_end, near_end),
    )


def backward_pieces(bounds: TileBounds, block: int, kv_len: int) -> Tensor:
    """For each block of keys the tiles of query rows that visit it; shapes as in `forward_pieces`.

    Bounds never fall from tile to tile, so the tiles that read a block form a range, found by binary search.
    """
    begin, end, count_below = _columns(bounds, block, kv_len)
    visit_begin = count_below(bounds.end_max, begin + 1)
    near_stop = count_below(bounds.near_min, end)
    sink_begin = count_below(bounds.sink_end, begin + 1)
    sink_stop = count_below(bounds.first_min, end)
    reads_sinks = torch.maximum(sink_begin, visit_begin) < sink_stop
    visit_stop = torch.where(reads_sinks, torch.maximum(near_stop, sink_stop), near_stop)
    visit_stop = torch.maximum(visit_stop, visit_begin)
    # The last block may reach past the keys; no block beyond `kv_len` exists for full ones to be confused with.
    covered = count_below(bounds.end_min, torch.where(end > kv_len, torch.full_like(end, 2**40), end))
    full_begin, full_stop = _inside(covered, count_below(bounds.near_max, begin + 1), visit_begin, visit_stop)
    sink_full_begin, sink_full_stop = _inside(
        torch.maximum(torch.maximum(count_below(bounds.sink_end, end), covered), full_stop),
        count_below(bounds.first_max, begin + 1),
        full_stop,
        visit_stop,
    )
    return _as_pieces(
        (full_begin, full_stop),
        (sink_full_begin, sink_full_stop),
        (visit_begin, full_begin),
        (full_stop, sink_full_begin),
        (sink_full_stop, visit_stop),
        (visit_stop, visit_stop),
    )


def _columns(bounds: TileBounds, block: int, kv_len: int) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Begin and end of each block of keys `[batch or 1, num_blocks]`, and how many tiles have a bound below a limit."""
    begin = torch.arange(-(-kv_len // block), device=bounds.near_min.device) * block
    begin = begin.expand(len(bounds.near_min), -1).contiguous()

    def count_below(bound: Tensor, limit: Tensor) -> Tensor:
        return torch.searchsorted(bound.contiguous(), limit.contiguous())

    return begin, begin + block, count_below


def every_block(num_tiles: int, num_blocks: int) -> Tensor:
    """Every tile visits every block with its mask: `[1, num_tiles, 2 * NUM_PIECES]`."""
    zero = torch.zeros(1, num_tiles, dtype=torch.int64)
    nothing = (zero, zero)
    return _as_pieces(nothing, nothing, (zero, zero + num_blocks), nothing, nothing, nothing)


def all_partial(pieces: Tensor) -> Tensor:
    """The same blocks, each with its mask, for tiles whose blocks form one range."""
    ends, offsets = pieces.split(NUM_PIECES, -1)
    lengths = ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))
    begin = (offsets + ends - lengths).masked_fill(lengths == 0, 2**40).amin(-1)
    begin = begin.masked_fill(ends[..., -1] == 0, 0)
    nothing = (begin, begin)
    return _as_pieces(nothing, nothing, (begin, begin + ends[..., -1]), nothing, nothing, nothing)


def _as_pieces(*ranges: tuple[Tensor, Tensor]) -> Tensor:
    begins = torch.stack([begin for begin, _ in ranges], -1)
    lengths = torch.stack([(end - begin).clamp_min(0) for begin, end in ranges], -1)
    ends = lengths.cumsum(-1)
    return torch.cat([ends, begins - (ends - lengths)], -1)


def _inside(begin: Tensor, end: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """[begin, end) cut to [low, high); an empty range lies at `low`, so that the rest of [low, high) is one piece."""
    begin, end = torch.maximum(begin, low), torch.minimum(end, high)
    some = begin < end
    return torch.where(some, begin, low), torch.where(some, end, low)


def _ceil_div(x: Tensor, block: int) -> Tensor:
    return (x + block - 1) // block
