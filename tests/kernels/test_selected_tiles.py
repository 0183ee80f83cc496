"""Tables made on the device from a selection: walked step by step, they must mean what the selection says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockSelection, HeadPattern, TokenPositions
from sparse_hf_kernels.tiles import RowGeometry, TileShape, TileTable, backward_table, forward_table

BATCH, NUM_KV_HEADS, GROUP = 2, 3, 2
NUM_HEADS = NUM_KV_HEADS * GROUP
SIZE = 64
SELECTED, WINDOW = HeadPattern(selected=True), HeadPattern(window=100, num_sink_tokens=7)
LAYOUTS = {
    "selected": AttentionLayout(patterns=(SELECTED,) * NUM_KV_HEADS),
    "beside windows": AttentionLayout(patterns=(SELECTED, WINDOW, SELECTED)),
    "beside last rows": AttentionLayout(patterns=(replace(WINDOW, num_last_tokens=50), SELECTED, HeadPattern())),
}
LENGTHS = [(256, 256), (200, 200), (130, 322), (1, 1), (1, 65), (64, 192)]
SHAPES = [TileShape(rows=64, columns=64), TileShape(rows=32, columns=64), TileShape(rows=64, columns=16)]


def selection_of(q_len: int, kv_len: int) -> BlockSelection:
    """Random causal blocks, rows without any among them, and garbage where lists end."""
    offset = kv_len - q_len
    own = torch.arange(offset // SIZE, -(-kv_len // SIZE))[:, None]
    columns = torch.arange(-(-kv_len // SIZE))
    mask = (torch.rand(BATCH, NUM_HEADS, len(own), len(columns)) < 0.5) & (columns <= own)
    mask[0, 1] = False
    selection = BlockSelection.from_mask(mask, SIZE)
    listed = torch.arange(len(columns)) < selection.counts[..., None]
    return replace(selection, indices=torch.where(listed, selection.indices, 10**6))


def expected(layout: AttentionLayout, selection: BlockSelection, q_len: int, kv_len: int) -> Tensor:
    """Boolean `[batch, num_heads, q_len, kv_len]`."""
    i = torch.arange(kv_len - q_len, kv_len)[:, None]
    j = torch.arange(kv_len)
    masks = []
    for head in range(NUM_HEADS):
        pattern = layout.patterns[head // GROUP]
        keep = layout.allowed(pattern, i, j, kv_len - 1).expand(BATCH, -1, -1)
        if pattern.selected:
            chosen = selection.block_mask(-(-kv_len // SIZE))[:, head]
            keep = keep & chosen[:, (i // SIZE - i[0] // SIZE)[:, 0]][:, :, j // SIZE]
        masks.append(keep)
    return torch.stack(masks, 1)


def steps(table: TileTable, row: Tensor) -> list[tuple[int, bool]]:
    """(block, needs a mask) of each step."""
    at, num_blocks = int(row[1]), int(row[7])
    if at < 0:
        pieces = zip(row[2:8].tolist(), row[8:14].tolist(), strict=True)
        offsets = [(end, shift) for end, shift in pieces]
        return [(i + next(shift for end, shift in offsets if i < end), i >= int(row[3])) for i in range(num_blocks)]
    return [(int(table.lists[at + i]), i >= int(row[3])) for i in range(num_blocks)]


def rows_of(table: TileTable, transposed: bool) -> list[tuple[int, int, Tensor]]:
    """(batch row, query head, row of the table) of everything that the launch walks."""
    found = []
    for entry in table.schedule.tolist():
        if not transposed:
            found.append((*divmod(entry[1], NUM_HEADS), table.rows[entry[0]]))
            continue
        b, kv_head = divmod(entry[1], NUM_KV_HEADS)
        for g in range(GROUP):
            found.append((b, kv_head * GROUP + g, table.rows[entry[0] + g * table.group_stride]))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tables_mean_the_selection(layout: AttentionLayout, transposed: bool, shape: TileShape) -> None:
    for q_len, kv_len in LENGTHS:
        if (kv_len - q_len) % SIZE:
            continue
        selection = selection_of(q_len, kv_len)
        geometry = RowGeometry.of(TokenPositions.causal(q_len, kv_len))
        options = dict(batch=BATCH, num_heads=NUM_HEADS, head_dim=64, device=torch.device("cpu"), selection=selection)
        table = (backward_table if transposed else forward_table)(layout, geometry, shape, **options)
        truth = expected(layout, selection, q_len, kv_len)
        found = torch.zeros(BATCH, NUM_HEADS, q_len, kv_len, dtype=torch.int64)
        for b, head, row in rows_of(table, transposed):
            for block, partial in steps(table, row):
                m, n = (block, int(row[0])) if transposed else (int(row[0]), block)
                rows = slice(m * shape.rows, (m + 1) * shape.rows)
                columns = slice(n * shape.columns, (n + 1) * shape.columns)
                # The element mask of selected patterns is causality alone.
                allowed = truth[b, head, rows, columns]
                assert allowed.all() or partial, "a block without a mask holds keys that are not read"
                found[b, head, rows, columns] += allowed
        assert torch.equal(found, truth.long())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_cut_schedules_cover_every_step_once(layout: AttentionLayout) -> None:
    """Lengths are known on the device alone: parts are cut from a bound, and those past the end are empty."""
    q_len, kv_len = 1 + 128 * 25, 128 * 27 + 1
    selection, geometry = selection_of(q_len, kv_len), RowGeometry.of(TokenPositions.causal(q_len, kv_len))
    options = dict(batch=BATCH, num_heads=NUM_HEADS, head_dim=64, device=torch.device("cpu"), selection=selection)
    shape = TileShape(rows=32, columns=64)
    table = backward_table(layout, geometry, shape, num_programs=128, **options)
    visits: dict[tuple[int, int, int], list[int]] = {}
    parts: dict[int, int] = {}
    for row, head, g0, g1, first, last, slot, _ in table.schedule.tolist():
        for g in range(g0, g1):  # as the kernel does
            steps = int(table.rows[row + g * table.group_stride, 7])
            end = min(last, steps) if g == g1 - 1 else steps
            begin = min(first if g == g0 else 0, end)
            visits.setdefault((row, head, g), []).extend(range(begin, end))
        if slot >= 0:
            parts[slot] = row
    assert table.num_partials == len(parts) > 0 and sorted(parts) == list(range(len(parts)))
    for (row, _, g), steps in visits.items():
        assert steps == list(range(int(table.rows[row + g * table.group_stride, 7])))
    assert sum(bool(steps) for steps in visits.values()) == int((table.rows[:, 7] > 0).sum())
    for tile, head, first_slot, num_parts in table.splits.tolist():
        assert {int(table.rows[parts[first_slot + n], 0]) for n in range(num_parts)} == {tile}
        assert tile == 0 or not layout.patterns[head % NUM_KV_HEADS].selected


def test_costly_heads_and_late_queries_come_first() -> None:
    selection, geometry = selection_of(2048, 2048), RowGeometry.of(TokenPositions.causal(2048, 2048))
    layout = AttentionLayout(patterns=(HeadPattern(window=10), SELECTED, HeadPattern()))
    table = forward_table(
        layout, geometry, SHAPES[0], batch=BATCH, num_heads=NUM_HEADS, head_dim=64, device=torch.device("cpu"),
        selection=selection,
    )  # fmt: skip
    heads, tiles = table.schedule[:, 1].view(-1, 32), table.rows[table.schedule[:, 0].long(), 0].view(-1, 32)
    assert (heads == heads[:, :1]).all() and tiles[:8].tolist() == [list(range(31, -1, -1))] * 8
    assert (heads[:, 0] % NUM_HEADS // GROUP).tolist() == [2] * 4 + [1] * 4 + [0] * 4


def test_what_cannot_become_tiles_is_refused() -> None:
    options = dict(batch=BATCH, num_heads=NUM_HEADS, head_dim=64, device=torch.device("cpu"))
    selection = selection_of(200, 200)
    with pytest.raises(ValueError, match="begins a block of 64"):
        geometry = RowGeometry.of(TokenPositions.causal(136, 200, q_offset=60))
        forward_table(LAYOUTS["selected"], geometry, SHAPES[0], selection=selection, **options)
    with pytest.raises(ValueError, match="do not divide blocks of 64"):
        geometry = RowGeometry.of(TokenPositions.causal(200, 200))
        forward_table(LAYOUTS["selected"], geometry, TileShape(rows=128, columns=64), selection=selection, **options)
