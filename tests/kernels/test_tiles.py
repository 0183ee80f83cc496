"""Tile tables, walked as a kernel walks them, give back exactly the mask that the layout means."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, TokenPositions
from sparse_hf_kernels.blocks import BlockRule
from sparse_hf_kernels.tiles import RowGeometry, TileShape, TileTable, backward_table, forward_table

CPU = torch.device("cpu")
GROUP = 2


def random_blocks(num_rows: int, size: int, causal: bool = True) -> HeadPattern:
    mask = torch.rand(num_rows, num_rows, generator=torch.Generator().manual_seed(num_rows)) < 0.4
    return HeadPattern(blocks=BlockList.from_mask(mask.tril() if causal else mask, size))


def layouts(causal: bool) -> dict[str, AttentionLayout]:
    streaming = HeadPattern(window=20, num_sink_tokens=3)
    wide = HeadPattern(window=70, num_sink_tokens=40)
    exact, cut = random_blocks(12, 32, causal), random_blocks(24, 16, causal)
    made = {
        "dense": (HeadPattern(), HeadPattern()),
        "streaming": (streaming, wide),
        "mixed": (exact, wide),
        "cut": (cut, streaming),
    }
    found = {name: AttentionLayout(patterns=patterns, causal=causal) for name, patterns in made.items()}
    found["native window"] = AttentionLayout(patterns=(wide, exact), max_distance=50, causal=causal)
    if causal:
        found["dense rows"] = AttentionLayout(patterns=(streaming, exact), num_dense_rows=33)
        last = HeadPattern(window=40, num_sink_tokens=5, num_last_tokens=37)
        found["last rows"] = AttentionLayout(patterns=(last, exact))
        found["last rows, more"] = AttentionLayout(patterns=(wide, replace(last, window=9)), num_dense_rows=33)
        found["last rows, all"] = AttentionLayout(patterns=(replace(last, num_last_tokens=500),) * 2, max_distance=90)
        found["last rows, tiles"] = AttentionLayout(patterns=(streaming, replace(last, num_last_tokens=32)))
        found["dense rows, cut"] = AttentionLayout(patterns=(wide, cut), num_dense_rows=100, max_distance=120)
    return found


def positions() -> dict[str, TokenPositions]:
    lengths = torch.tensor([[200], [77], [1]])
    slots = torch.arange(200)
    return {
        "causal": TokenPositions.causal(200, 200),
        "ragged": TokenPositions.causal(129, 129),
        "chunk": TokenPositions.causal(70, 233),
        "dropped prefix": TokenPositions.causal(5, 60, k_offset=100),
        "one": TokenPositions.causal(1, 1),
        "past the keys": TokenPositions.causal(70, 37, q_offset=30),
        "long past the keys": TokenPositions.causal(40, 30, q_offset=150),
        "left": TokenPositions.from_padding_mask(slots >= 200 - lengths),
        "right": TokenPositions.from_padding_mask(slots < lengths),
        "left chunk": TokenPositions.from_padding_mask(slots >= 200 - lengths, q_len=40),
        "holes": TokenPositions.from_padding_mask(torch.rand(2, 100) < 0.6),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 90, 91, 130, 300])),
        "nobody": TokenPositions.from_padding_mask(torch.zeros(1, 50, dtype=torch.bool)),
    }


def row_masks(table: TileTable, row: Tensor, where: RowGeometry, layout: AttentionLayout, b: int, head: int) -> Tensor:
    """What the element-wise mask of this row of the table allows: boolean `[q_len, kv_len]`."""
    if where.is_closed_form:
        pos = torch.arange(where.q_len) + where.offset
        start, end = torch.full_like(pos, where.start), torch.full_like(pos, where.kv_len)
    else:
        pick = min(b, where.batch - 1)
        pos, start, end = where.q_pos[pick].long(), where.q_start[pick].long(), where.q_end[pick].long()
    keys = torch.arange(where.kv_len)[None] if where.k_pos is None else where.k_pos[min(b, len(where.k_pos) - 1)][None]
    window, sinks = int(row[14]), int(row[15])
    pos, start, end = pos[:, None], start[:, None], end[:, None]
    dense_row = pos - start < layout.num_dense_rows
    if window < 0:
        assert table.has_last_rows
        dense_row, window = dense_row | (pos >= end - layout.num_last_tokens), -window
    keep = ((pos - keys).abs() < window) | (keys < start + sinks) | dense_row
    keep = keep & (keys >= start) & ((pos - keys).abs() < layout.max_distance) & (pos >= start)
    keep = keep & ((keys <= pos) if layout.causal else (keys < end))
    if table.look_up is not None and int(table.head_plane[head]) >= 0:
        plane = table.look_up[int(table.head_plane[head])].bool()
        size, last = table.look_up_size, len(plane) - 1
        on = plane[((pos - start) // size).clamp(0, last), ((keys - start) // size).clamp(0, last)]
        keep = keep & (on | dense_row)
    return keep


def steps(table: TileTable, row: Tensor) -> list[tuple[int, bool]]:
    """(block, needs a mask) for each step of a tile."""
    ends, offsets, at = row[2:8].tolist(), row[8:14].tolist(), int(row[1])
    found = []
    for i in range(ends[5]):
        piece = sum(i >= end for end in ends[:5])
        found.append((int(table.lists[at + i]) if at >= 0 else i + offsets[piece], i >= ends[1]))
    return found


def walk(
    table: TileTable, shape: TileShape, where: RowGeometry, layout: AttentionLayout, batch: int, transposed: bool
) -> Tensor:
    """The mask `[batch, num_kv_heads, q_len, kv_len]` of the first query head of each group."""
    group = 1 if transposed else GROUP
    num_heads = layout.num_kv_heads * group
    mask = torch.zeros(batch, layout.num_kv_heads, where.q_len, where.kv_len, dtype=torch.int64)
    seen = set()
    for row_index, head_index in table.schedule.tolist():
        b, head = divmod(head_index, num_heads)
        row = table.rows[row_index]
        assert (b, head, int(row[0])) not in seen, "a tile comes twice"
        seen.add((b, head, int(row[0])))
        allowed = row_masks(table, row, where, layout, b, head // group)
        blocks = steps(table, row)
        assert len({block for block, _ in blocks}) == len(blocks), "a block comes twice"
        for block, partial in blocks:
            m, n = (block, int(row[0])) if transposed else (int(row[0]), block)
            rows = slice(m * shape.rows, (m + 1) * shape.rows)
            columns = slice(n * shape.columns, (n + 1) * shape.columns)
            assert block >= 0 and rows.start < where.q_len and columns.start < where.kv_len
            if not partial:
                assert columns.stop <= where.kv_len, "a full block reaches past the keys"
            cut = allowed[rows, columns]
            mask[b, head // group, rows, columns] += cut if partial else torch.ones_like(cut)
    tiles = -(-where.kv_len // shape.columns) if transposed else -(-where.q_len // shape.rows)
    assert len(seen) == batch * num_heads * tiles
    return mask // group


@pytest.mark.parametrize("shape", [TileShape(rows=32, columns=16), TileShape(rows=16, columns=32)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("place", positions())
def test_tables_mean_the_layout(
    naive_mask: Callable[..., Tensor], place: str, transposed: bool, causal: bool, shape: TileShape
) -> None:
    where = positions()[place]
    geometry = RowGeometry.of(where)
    batch = max(2, geometry.batch)
    for name, layout in layouts(causal).items():
        options = dict(batch=batch, num_heads=2 * GROUP, head_dim=64, device=CPU)
        table = (backward_table if transposed else forward_table)(layout, geometry, shape, **options)
        expected = naive_mask(layout, where).expand(batch, -1, -1, -1)
        found = walk(table, shape, geometry, layout, batch, transposed)
        # Rows without token take no mask in full blocks: kernels write zeros there whatever was computed.
        token = (where.q_positions >= 0).expand(batch, -1)[:, None, :, None]
        assert torch.equal(found * token, expected.long()), name


@dataclass(frozen=True)
class EveryBlock(BlockRule):
    block_size: int = 16

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        return q_blocks >= k_blocks


def test_masks_of_blocks_that_int32_cannot_address_are_refused() -> None:
    """A step over a cache without its oldest keys: small tensors, block numbers of a long sequence."""
    layout = AttentionLayout(patterns=(HeadPattern(blocks=EveryBlock()),))
    geometry = RowGeometry.of(TokenPositions.causal(1, 1, k_offset=46341 * 16))
    with pytest.raises(ValueError, match="reach 741440 tokens, got a sequence of 741457"):
        forward_table(layout, geometry, TileShape(rows=16, columns=16), batch=1, num_heads=1, head_dim=64, device=CPU)
