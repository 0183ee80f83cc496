"""Tile tables: what a kernel launch reads to know which tile to work on and which blocks to visit.

One table serves all heads of a layer, whatever their patterns, so that one launch can balance them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.capture import may_read
from sparse_hf_kernels.layout import UNBOUNDED, AttentionLayout, HeadPattern
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.tiles.bounds import TileBounds, tile_bounds
from sparse_hf_kernels.tiles.geometry import RowGeometry
from sparse_hf_kernels.tiles.lists import TileLists, last_row_lists, tile_lists
from sparse_hf_kernels.tiles.pieces import (
    NUM_PIECES,
    all_partial,
    backward_pieces,
    every_block,
    forward_pieces,
)
from sparse_hf_kernels.tiles.schedule import cut, launch_order, order_of_heads
from sparse_hf_kernels.tiles.selected import SelectedLists, selected_rows

ROW_INTS = 16
"""A row: tile, offset into the lists (-1: walk the pieces), 6 piece ends, 6 piece offsets, window, number of sinks."""

NO_LIST = -1
LARGEST_WINDOW = 2**30
"""Windows are cut to this, so that `position + window` stays within int32."""

LARGEST_LOOK_UP = 46340
"""Blocks that a side of a block mask may have: kernels find its entries by int32."""


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
        has_last_rows: some rows have a negative window: it goes for all but the dense last rows, which kernels tell
            apart. Where all or none of a tile's rows are such, its window says so.
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
    has_last_rows: bool = False
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
    selection: BlockSelection | None = None,
) -> TileTable:
    """One tile per batch row, query head and `shape.rows` queries; it visits blocks of `shape.columns` keys."""
    launch = _Launch(
        layout=layout, shape=shape, batch=batch, num_heads=num_heads, head_dim=head_dim, device=device, transposed=False
    )
    return _kept(launch, geometry) if selection is None else _build_selected(launch, geometry, selection)


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
    selection: BlockSelection | None = None,
) -> TileTable:
    """One tile per batch row, KV head and `shape.columns` keys; it visits tiles of `shape.rows` queries.

    Every query head of the group walks the same tiles. With `num_programs`, the number of CTAs that run at a time,
    tiles that would outlast the others (sinks, which every query reads) are cut in parts, if their lengths are known
    without a look at the device: not those of a selection.
    """
    launch = _Launch(
        layout=layout, shape=shape, batch=batch, num_heads=num_heads, head_dim=head_dim, device=device,
        transposed=True, num_programs=num_programs,
    )  # fmt: skip
    return _kept(launch, geometry) if selection is None else _build_selected(launch, geometry, selection)


def _kept(launch: _Launch, geometry: RowGeometry) -> TileTable:
    """The table, built once: by lengths if they decide it (so that a CUDA graph's capture finds what a warm-up made),

    else with the geometry, which all layers of a pass share.
    """
    if geometry.is_closed_form:
        return _closed_form_table(launch, geometry.q_len, geometry.kv_len, geometry.offset, geometry.start)
    if geometry.k_pos is not None and all(pattern.blocks is None for pattern, _ in launch.layout.groups):
        return _coordinate_table(launch, geometry.q_len, geometry.kv_len)
    known = geometry.__dict__.setdefault("_tables", {})
    if launch not in known:
        known[launch] = _build(launch, geometry)
    return known[launch]


@lru_cache(maxsize=128)
def _closed_form_table(launch: _Launch, q_len: int, kv_len: int, offset: int, start: int) -> TileTable:
    return _build(launch, RowGeometry(q_len=q_len, kv_len=kv_len, offset=offset, start=start))


@lru_cache(maxsize=128)
def _coordinate_table(launch: _Launch, q_len: int, kv_len: int) -> TileTable:
    """Every tile visits every block, whatever the coordinates."""
    unread = torch.empty(1, 0, dtype=torch.int32)
    return _build(launch, RowGeometry(q_len=q_len, kv_len=kv_len, q_pos=unread, k_pos=unread))


def _build(launch: _Launch, geometry: RowGeometry) -> TileTable:
    layout, device, transposed = launch.layout, launch.device, launch.transposed
    patterns = _Patterns(layout, geometry, launch.shape, transposed, device)
    rows = torch.stack([patterns.rows(pattern).to(device) for pattern, _ in layout.groups])
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
        lists=patterns.all_lists(device),
    )
    if launch.num_programs is not None:
        schedule, splits, num_partials = cut(table.rows, table.schedule, launch.group, launch.num_programs)
        table = replace(table, schedule=schedule, splits=splits, num_partials=num_partials)
    return patterns.finish(table)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frame:
    """What the tables of one length share, whatever is selected.

    Args:
        fixed: int32 `[patterns, num_tiles, ROW_INTS]`, rows of the patterns that are not selected.
        pattern_of_head: int32 `[num_heads]`: row of `fixed`, -1 for selected heads.
        table: schedule, lists of the fixed patterns and masks; its rows are missing.
        has_lists: some fixed pattern has lists.
        others: boolean `[num_heads]`, the heads that are not selected; None if all are.
    """

    fixed: Tensor
    pattern_of_head: Tensor
    table: TileTable
    has_lists: bool
    others: Tensor | None


def _build_selected(launch: _Launch, geometry: RowGeometry, selection: BlockSelection) -> TileTable:
    """A table with a row for every batch row, query head and tile, since each head's selection is its own."""
    frame = _frame(launch, geometry.q_len, geometry.kv_len, geometry.offset, selection.block_size)
    chosen = SelectedLists.of(selection.expand(launch.batch), geometry, launch.transposed, frame.others)
    tiles, lists = (launch.shape.rows, launch.shape.columns), frame.table.lists
    flat = chosen.flat(*tiles)
    base = len(lists) if frame.has_lists else 0
    rows = selected_rows(chosen, frame.fixed, frame.pattern_of_head, geometry, *tiles, base)
    return replace(frame.table, rows=rows, lists=torch.cat([lists, flat]) if frame.has_lists else flat)


@lru_cache(maxsize=128)
def _frame(launch: _Launch, q_len: int, kv_len: int, offset: int, block_size: int) -> _Frame:
    layout, transposed, device = launch.layout, launch.transposed, launch.device
    patterns = _Patterns(
        layout, RowGeometry(q_len=q_len, kv_len=kv_len, offset=offset), launch.shape, transposed, device
    )
    num_tiles = patterns.num_tiles
    others = [(pattern, heads) for pattern, heads in layout.groups if not pattern.selected]
    fixed = [patterns.rows(pattern)[0].cpu() for pattern, _ in others] or [torch.zeros(num_tiles, ROW_INTS)]
    rows = torch.stack(fixed).to(torch.int32)
    pattern_of_head = torch.full((layout.num_kv_heads,), -1)
    for index, (_, heads) in enumerate(others):
        pattern_of_head[list(heads)] = index
    pattern_of_head = pattern_of_head.repeat_interleave(launch.group)
    grouped = pattern_of_head.view(layout.num_kv_heads, -1)
    table = TileTable(
        rows=rows,
        schedule=order_of_heads(rows, grouped, launch.batch, transposed=transposed).to(device),
        lists=patterns.all_lists(device),
        group_stride=num_tiles if transposed else 0,
    )
    if launch.num_programs is not None:
        visitors = -(-q_len // block_size) * (block_size // launch.shape.rows)
        table = _cut_selected(table, grouped[:, 0], launch, num_tiles, visitors)
    return _Frame(
        fixed=rows.to(device),
        pattern_of_head=pattern_of_head.to(device, torch.int32),
        table=patterns.finish(table),
        has_lists=bool(patterns.lists),
        others=(pattern_of_head >= 0).to(device) if others else None,
    )


def _cut_selected(
    table: TileTable, pattern_of_head: Tensor, launch: _Launch, num_tiles: int, visitors: int
) -> TileTable:
    """The table with long tiles cut; of selected heads each may have as many as `visitors` steps."""
    selected = (pattern_of_head < 0)[:, None]
    bound = torch.zeros(num_tiles, ROW_INTS, dtype=torch.int32)
    bound[:, 0], bound[:, 2:8] = torch.arange(num_tiles), visitors
    steps = torch.where(selected[..., None], bound, table.rows[pattern_of_head.clamp_min(0)])
    # One row per member of the group, as in the table itself.
    rows = steps[None, :, None].expand(launch.batch, -1, launch.group, -1, -1).flatten(0, 3).to(table.schedule.device)
    unknown = selected.repeat(launch.batch, 1).to(table.schedule.device)[table.schedule[:, 1].long(), 0]
    schedule, splits, num_partials = cut(rows, table.schedule, launch.group, launch.num_programs or 1, unknown)
    return replace(table, schedule=schedule, splits=splits, num_partials=num_partials)


@dataclass
class _Patterns:
    """The rows of each distinct pattern."""

    layout: AttentionLayout
    geometry: RowGeometry
    shape: TileShape
    transposed: bool
    device: torch.device
    lists: list[Tensor] = field(default_factory=list)
    has_last_rows: bool = False
    _cut: dict[HeadPattern, int] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of queries and of keys."""
        return -(-self.geometry.q_len // self.shape.rows), -(-self.geometry.kv_len // self.shape.columns)

    @property
    def num_tiles(self) -> int:
        """Tiles of a head that have rows of the table."""
        return self.grid[1 if self.transposed else 0]

    def rows(self, pattern: HeadPattern) -> Tensor:
        """int64 `[batch or 1, num_tiles, ROW_INTS]`."""
        if self.geometry.k_pos is not None:
            num_tiles, num_blocks = reversed(self.grid) if self.transposed else self.grid
            pieces = every_block(num_tiles, num_blocks)
            self._cuts(pattern)
            return self._assemble(pattern, pieces, torch.full(pieces.shape[:2], NO_LIST))
        tiles = self.shape.rows, self.shape.columns
        options: dict[str, Any] = {"transposed": self.transposed, "device": self.device}
        if pattern.num_last_tokens:
            return self._listed(pattern, last_row_lists(pattern, self.layout, self.geometry, *tiles, **options))
        bounds = tile_bounds(pattern, self.layout, self.geometry, self.shape.rows)
        if pattern.blocks is not None and self.geometry.is_closed_form and self.geometry.start == 0:
            found = tile_lists(pattern, self.layout, bounds, self.geometry, *tiles, **options)
            if not found.exact:
                self._cuts(pattern)
            return self._listed(pattern, found)
        pieces = self._pieces(bounds)
        if pattern.blocks is not None:
            self._cuts(pattern)
            pieces = all_partial(pieces)
        return self._assemble(pattern, pieces, torch.full(pieces.shape[:2], NO_LIST, device=pieces.device))

    def all_lists(self, device: torch.device) -> Tensor:
        """What the rows' offsets point into; one entry at least, for kernels want a pointer."""
        return torch.cat([each.to(device) for each in self.lists] or [torch.zeros(1, dtype=torch.int32, device=device)])

    def _pieces(self, bounds: TileBounds) -> Tensor:
        block, kv_len = self.shape.columns, self.geometry.kv_len
        return (backward_pieces if self.transposed else forward_pieces)(bounds, block, kv_len)

    def _listed(self, pattern: HeadPattern, found: TileLists) -> Tensor:
        base = sum(len(entries) for entries in self.lists)
        self.lists.append(found.indices)
        ends = torch.stack([found.num_full] * 2 + [found.num_blocks] * (NUM_PIECES - 2), -1)
        return self._assemble(pattern, torch.cat([ends, torch.zeros_like(ends)], -1), found.row_ptr + base)

    def _assemble(self, pattern: HeadPattern, pieces: Tensor, offset: Tensor) -> Tensor:
        tile = torch.arange(pieces.shape[1], device=pieces.device).expand(pieces.shape[:2])
        by_list = pattern.blocks is not None
        window = torch.full_like(tile, LARGEST_WINDOW if by_list else min(pattern.window, LARGEST_WINDOW))
        if pattern.num_last_tokens:
            window = self._last_row_windows(window, pattern.num_last_tokens)
        sinks = torch.full_like(tile, 0 if by_list else min(pattern.num_sink_tokens, LARGEST_WINDOW))
        parts = (tile, offset.to(tile.device))
        return torch.cat([torch.stack(parts, -1), pieces, torch.stack((window, sinks), -1)], -1)

    def _last_row_windows(self, window: Tensor, num_last: int) -> Tensor:
        """The windows of tiles: none for dense rows, negative where kernels have to look at each row."""
        geometry, tile = self.geometry, self.shape.rows
        border = geometry.kv_len - num_last - geometry.offset  # the first dense row
        if self.transposed or not geometry.is_closed_form:
            self.has_last_rows = True
            return -window
        self.has_last_rows = self.has_last_rows or (0 < border < geometry.q_len and border % tile > 0)
        first = torch.arange(window.shape[1], device=window.device) * tile
        last = (first + tile).clamp_max(geometry.q_len) - 1
        return torch.where(last < border, window, torch.where(first >= border, LARGEST_WINDOW, -window))

    def _cuts(self, pattern: HeadPattern) -> None:
        """Notes that the blocks of this pattern need the element-wise mask."""
        if pattern.blocks is not None:
            self._cut.setdefault(pattern, len(self._cut))

    def _longest(self) -> int:
        """Tokens of the longest sequence, or more."""
        geometry = self.geometry
        if geometry.q_pos is not None and geometry.q_start is not None:
            # A cache may have dropped keys beyond the model's window or the rule's reach; else there is a slot for each
            # position. Where nothing can be read, only a window says so.
            dropped = geometry.q_len > 0 and (self.layout.max_distance < UNBOUNDED or may_read())
            return max(geometry.kv_len, int((geometry.q_pos - geometry.q_start).max()) + 1 if dropped else 0)
        return max(geometry.kv_len, geometry.offset + geometry.q_len) - geometry.start

    def finish(self, table: TileTable) -> TileTable:
        """The table with what its rows want of the kernels: the masks of those patterns whose blocks tiles cut.

        Raises:
            ValueError: if they differ in block size, or are too many for kernels.
        """
        if self.has_last_rows:
            table = replace(table, has_last_rows=True)
        cut = [pattern.blocks for pattern in self._cut if pattern.blocks is not None]
        if not cut:
            return table
        sizes = {blocks.block_size for blocks in cut}
        if len(sizes) > 1:
            raise ValueError(
                f"block lists of one layer must share their block size, got {sorted(sizes)}; "
                "or use a block size that is a multiple of the kernel's tile"
            )
        size, device = sizes.pop(), table.rows.device
        num_blocks = -(-self._longest() // size)
        if num_blocks > LARGEST_LOOK_UP:
            raise ValueError(
                f"masks of blocks of {size} tokens reach {LARGEST_LOOK_UP * size} tokens, got a sequence of "
                f"{self._longest()}; use larger blocks"
            )
        planes = torch.stack([blocks.block_mask(num_blocks) for blocks in cut]).to(torch.int8)
        heads = [self._cut.get(pattern, -1) for pattern in self.layout.patterns]
        return replace(
            table,
            look_up=planes.to(device),
            look_up_size=size,
            head_plane=torch.tensor(heads, dtype=torch.int32, device=device),
        )
