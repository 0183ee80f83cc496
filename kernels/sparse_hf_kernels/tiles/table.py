"""Tile tables: what a kernel launch reads to know which tile to work on and which blocks to visit.

One table serves all heads of a layer, whatever their patterns, so that one launch can balance them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout, HeadPattern
from sparse_hf_kernels.tiles.bounds import TileBounds, tile_bounds
from sparse_hf_kernels.tiles.geometry import RowGeometry
from sparse_hf_kernels.tiles.lists import tile_lists
from sparse_hf_kernels.tiles.pieces import (
    NUM_PIECES,
    all_partial,
    backward_pieces,
    every_block,
    forward_pieces,
)
from sparse_hf_kernels.tiles.schedule import cut, launch_order

ROW_INTS = 16
"""A row: tile, offset into the lists (-1: walk the pieces), 6 piece ends, 6 piece offsets, window, number of sinks."""

NO_LIST = -1
LARGEST_WINDOW = 2**30
"""Windows are cut to this, so that `position + window` stays within int32."""


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """Query rows and keys of a score tile."""

    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TileTable:
    """What a launch walks.

    Args:
        rows: int32 `[num_rows, ROW_INTS]`, one per tile and distinct pattern (and batch row, where they differ).
        schedule: int32, in launch order: row of the table, and `batch index * num_heads + head`. `[num_tiles, 2]`, or
            `[num_parts, 8]` where backward tiles may be cut: then also the first and the last + 1 query head of the
            group, the first step (in the first head's list), the end (in the last one's), and the slot for a part's
            result, -1 for whole tiles; see `schedule.cut`.
        lists: int32: the blocks of tiles with an offset into the lists, of each tile the full ones first.
        look_up: int8 `[patterns, block rows, block rows]`: masks of blocks that tiles cut; None if tiles cut none.
        look_up_size: tokens per block of `look_up`.
        head_plane: int32 `[num_kv_heads]`: which plane of `look_up` masks a head, -1 for none.
        splits: int32 `[cut tiles, 4]`: tile, batch and KV head, first slot, number of parts; None if never cut.
        num_partials: number of slots.
        group_stride: backward tables: query head g of a group walks row `scheduled row + g * group_stride`.
    """

    rows: Tensor
    schedule: Tensor
    lists: Tensor
    look_up: Tensor | None = None
    look_up_size: int = 0
    head_plane: Tensor | None = None
    splits: Tensor | None = None
    num_partials: int = 0
    group_stride: int = 0

    @property
    def num_tiles(self) -> int:
        return len(self.schedule)


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """What a table depends on besides where rows and keys stand."""

    layout: AttentionLayout
    shape: TileShape
    batch: int
    num_heads: int
    head_dim: int
    device: torch.device
    transposed: bool
    num_programs: int | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.layout.num_kv_heads


def forward_table(
    layout: AttentionLayout,
    geometry: RowGeometry,
    shape: TileShape,
    *,
    batch: int,
    num_heads: int,
    head_dim: int,
    device: torch.device,
) -> TileTable:
    """One tile per batch row, query head and `shape.rows` queries; it visits blocks of `shape.columns` keys."""
    launch = _Launch(
        layout=layout, shape=shape, batch=batch, num_heads=num_heads, head_dim=head_dim, device=device, transposed=False
    )
    return _kept(launch, geometry)


def backward_table(
    layout: AttentionLayout,
    geometry: RowGeometry,
    shape: TileShape,
    *,
    batch: int,
    num_heads: int,
    head_dim: int,
    device: torch.device,
    num_programs: int | None = None,
) -> TileTable:
    """One tile per batch row, KV head and `shape.columns` keys; it visits tiles of `shape.rows` queries.

    Every query head of the group walks the same tiles. With `num_programs`, the number of CTAs that run at a time,
    tiles that would outlast the others (sinks, which every query reads) are cut in parts.
    """
    launch = _Launch(
        layout=layout, shape=shape, batch=batch, num_heads=num_heads, head_dim=head_dim, device=device,
        transposed=True, num_programs=num_programs,
    )  # fmt: skip
    return _kept(launch, geometry)


def _kept(launch: _Launch, geometry: RowGeometry) -> TileTable:
    """The table, built once: by lengths in closed form, else with the geometry, which all layers of a pass share."""
    if geometry.is_closed_form:
        return _closed_form_table(launch, geometry.q_len, geometry.kv_len, geometry.offset, geometry.start)
    known = geometry.__dict__.setdefault("_tables", {})
    if launch not in known:
        known[launch] = _build(launch, geometry)
    return known[launch]


@lru_cache(maxsize=128)
def _closed_form_table(launch: _Launch, q_len: int, kv_len: int, offset: int, start: int) -> TileTable:
    return _build(launch, RowGeometry(q_len=q_len, kv_len=kv_len, offset=offset, start=start))


def _build(launch: _Launch, geometry: RowGeometry) -> TileTable:
    layout, device, transposed = launch.layout, launch.device, launch.transposed
    patterns = _Patterns(layout, geometry, launch.shape, transposed)
    rows = torch.stack([patterns.rows(pattern) for pattern, _ in layout.groups]).to(device)
    pattern_of_head = torch.empty(layout.num_kv_heads, dtype=torch.long)
    for index, (_, heads) in enumerate(layout.groups):
        pattern_of_head[list(heads)] = index
    # What tiles of one KV head share: its keys and values, or its group's queries and output gradients.
    shared_rows = geometry.q_len * launch.group if transposed else geometry.kv_len
    table = TileTable(
        rows=rows.flatten(0, 2).to(torch.int32),
        schedule=launch_order(
            rows,
            pattern_of_head.to(device),
            batch=launch.batch,
            group=1 if transposed else launch.group,
            shared_bytes=4 * launch.head_dim * shared_rows,
        ),
        lists=torch.cat(patterns.lists or [torch.zeros(1, dtype=torch.int32)]).to(device),
    )
    if launch.num_programs is not None:
        schedule, splits, num_partials = cut(table.rows, table.schedule, launch.group, launch.num_programs)
        table = replace(table, schedule=schedule, splits=splits, num_partials=num_partials)
    return patterns.with_look_up(table)


@dataclass
class _Patterns:
    """The rows of each distinct pattern."""

    layout: AttentionLayout
    geometry: RowGeometry
    shape: TileShape
    transposed: bool
    lists: list[Tensor] = field(default_factory=list)
    _cut: dict[HeadPattern, int] = field(default_factory=dict)

    @property
    def _num_tiles(self) -> tuple[int, int]:
        return -(-self.geometry.q_len // self.shape.rows), -(-self.geometry.kv_len // self.shape.columns)

    def rows(self, pattern: HeadPattern) -> Tensor:
        """int64 `[batch or 1, num_tiles, ROW_INTS]`."""
        if self.geometry.k_pos is not None:
            num_tiles, num_blocks = reversed(self._num_tiles) if self.transposed else self._num_tiles
            pieces = every_block(num_tiles, num_blocks)
            self._cuts(pattern)
            return self._assemble(pattern, pieces, torch.full(pieces.shape[:2], NO_LIST))
        bounds = tile_bounds(pattern, self.layout, self.geometry, self.shape.rows)
        if pattern.blocks is not None and self.geometry.is_closed_form and self.geometry.start == 0:
            return self._list_rows(pattern, bounds)
        pieces = self._pieces(bounds)
        if pattern.blocks is not None:
            self._cuts(pattern)
            pieces = all_partial(pieces)
        return self._assemble(pattern, pieces, torch.full(pieces.shape[:2], NO_LIST, device=pieces.device))

    def _pieces(self, bounds: TileBounds) -> Tensor:
        block, kv_len = self.shape.columns, self.geometry.kv_len
        return (backward_pieces if self.transposed else forward_pieces)(bounds, block, kv_len)

    def _list_rows(self, pattern: HeadPattern, bounds: TileBounds) -> Tensor:
        found = tile_lists(
            pattern, self.layout, bounds, self.geometry, self.shape.rows, self.shape.columns, transposed=self.transposed
        )
        if not found.exact:
            self._cuts(pattern)
        base = sum(len(entries) for entries in self.lists)
        self.lists.append(found.indices)
        ends = torch.stack([found.num_full] * 2 + [found.num_blocks] * (NUM_PIECES - 2), -1)
        pieces = torch.cat([ends, torch.zeros_like(ends)], -1)[None]
        return self._assemble(pattern, pieces, (found.row_ptr + base)[None])

    def _assemble(self, pattern: HeadPattern, pieces: Tensor, offset: Tensor) -> Tensor:
        tile = torch.arange(pieces.shape[1], device=pieces.device).expand(pieces.shape[:2])
        by_list = pattern.blocks is not None
        window = torch.full_like(tile, LARGEST_WINDOW if by_list else min(pattern.window, LARGEST_WINDOW))
        sinks = torch.full_like(tile, 0 if by_list else min(pattern.num_sink_tokens, LARGEST_WINDOW))
        parts = (tile, offset.to(tile.device))
        return torch.cat([torch.stack(parts, -1), pieces, torch.stack((window, sinks), -1)], -1)

    def _cuts(self, pattern: HeadPattern) -> None:
        """Notes that the blocks of this pattern need the element-wise mask."""
        if pattern.blocks is not None:
            self._cut.setdefault(pattern, len(self._cut))

    def with_look_up(self, table: TileTable) -> TileTable:
        """The table with the masks of those patterns whose blocks tiles cut.

        Raises:
            ValueError: if they differ in block size.
        """
        cut = [pattern.blocks for pattern in self._cut if pattern.blocks is not None]
        if not cut:
            return table
        sizes = {blocks.block_size for blocks in cut}
        if len(sizes) > 1:
            raise ValueError(
                f"block lists of one layer must share their block size, got {sorted(sizes)}; "
                "or use a block size that is a multiple of the kernel's tile"
            )
        longest = max(blocks.num_rows for blocks in cut)
        planes = torch.zeros(len(cut), longest, longest, dtype=torch.int8)
        for plane, blocks in zip(planes, cut, strict=True):
            plane[: blocks.num_rows, : blocks.num_rows] = blocks.mask
        device = table.rows.device
        heads = [self._cut.get(pattern, -1) for pattern in self.layout.patterns]
        return replace(
            table,
            look_up=planes.to(device),
            look_up_size=sizes.pop(),
            head_plane=torch.tensor(heads, dtype=torch.int32, device=device),
        )
