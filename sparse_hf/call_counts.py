"""How many pairs and blocks attention reads, from where its queries stand and what a layout or a selection lists."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockSelection, TokenPositions
from sparse_hf_kernels.counts import MAX_ELEMENTS, keys_below


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryRuns:
    """Where the queries of a call stand: `q_len` from `first` on, or tensors `[rows, q_len]`; `copies` times."""

    q_len: int
    copies: int
    first: int | None = None
    positions: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def of(cls, positions: TokenPositions, batch: int) -> QueryRuns:
        if positions.offset is not None:
            return cls(q_len=positions.q_len, copies=batch, first=positions.offset)
        queries, segments = _own(positions.q_positions), positions.q_segments
        copies = batch // len(queries)
        segments = None if segments is None else _own(segments)
        return cls(q_len=positions.q_len, copies=copies, positions=queries, segments=segments)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """First position, length and number of each run of queries that follow each other in a sequence."""
        if self.first is not None or self.positions is None:
            return ((self.first or 0, self.q_len, self.copies),)
        table = self.positions.cpu().long()
        real = table >= 0
        rows = torch.arange(len(table))[:, None].expand_as(table)[real]
        values, breaks = table[real], rows.diff() != 0
        if self.segments is not None:
            breaks |= self.segments.cpu().expand_as(table)[real].diff() != 0
        starts = F.pad(breaks | (values.diff() != 1), (1, 0), value=True)[: len(values)].nonzero().flatten()
        lengths = torch.cat([starts, torch.tensor([len(values)])]).diff()
        counted = Counter(zip(values[starts].tolist(), lengths.tolist(), strict=True))
        return tuple((first, length, count * self.copies) for (first, length), count in counted.items())


def _own(x: Tensor) -> Tensor:
    """x, without the larger tensor that it may be a view of: a decoding step must not hold on to the whole sequence."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


@lru_cache(maxsize=4096)
def kept_pairs(layout: AttentionLayout, first: int, length: int) -> int:
    """Pairs that `length` queries from position `first` on keep, by the first pattern, of the keys up to the last."""
    pattern, end = layout.patterns[0], first + length
    step = MAX_ELEMENTS
    if pattern.blocks is not None:
        size = pattern.blocks.block_size
        step = max(1, MAX_ELEMENTS // -(-end // size)) * size
    limits = torch.tensor([end])
    rows = torch.arange(first, end).split(step)
    return sum(int(keys_below(layout, pattern, end, part, limits).sum()) for part in rows)


@lru_cache(maxsize=4096)
def kept_blocks(layout: AttentionLayout, first: int, length: int) -> int:
    """Blocks of the first pattern's rule of which these queries read a key, counted per row of blocks."""
    rule = layout.patterns[0].blocks
    assert rule is not None
    size = rule.block_size
    rows, kept = torch.arange(first // size, (first + length - 1) // size + 1), 0
    columns = torch.arange(int(rows[-1]) + 1)
    for part in rows.split(max(1, MAX_ELEMENTS // len(columns))):
        own = part[:, None]
        begin = (own * size).clamp_min(first)  # the row's query that is nearest to earlier blocks
        keep = rule.keeps(own, columns) | (begin < layout.num_dense_rows)
        near = begin - (columns * size + size - 1) < layout.max_distance
        kept += int((keep & near & (columns <= own)).sum())
    return kept


def causal_blocks(size: int, first: int, length: int) -> int:
    """Blocks of keys up to its own in each row of blocks that holds one of these queries."""
    low, high = first // size, (first + length - 1) // size
    return (high + 1) * (high + 2) // 2 - low * (low + 1) // 2


def selected_counts(selection: BlockSelection, q_offset: int, q_len: int) -> Tensor:
    """Pairs, blocks and columns that a selection keeps, over its batch: int64 `[3, num_heads]` on its device."""
    size = selection.block_size
    rows = torch.arange(selection.counts.shape[2], device=selection.counts.device) + q_offset // size
    begin, end = (rows * size).clamp_min(q_offset), ((rows + 1) * size).clamp_max(q_offset + q_len)
    counts, number = selection.counts.long(), end - begin
    last = selection.indices.gather(-1, (counts - 1).clamp_min(0)[..., None])[..., 0]
    own = (counts > 0) & (last == rows)
    # All keys of an earlier block; of the own block, those up to the query.
    pairs = (counts - own.long()) * number * size + own * (number * (begin + end - 2 * rows * size + 1) // 2)
    listed = torch.zeros_like(counts[:, :, 0])
    if selection.columns is not None:
        pairs = pairs + _column_pairs(selection, selection.columns.long(), q_offset, q_len, own)
        listed = (selection.columns >= 0).sum(-1)
    return torch.stack([pairs.sum((0, 2)), counts.sum((0, 2)), listed.sum(0)])


def _column_pairs(selection: BlockSelection, columns: Tensor, q_offset: int, q_len: int, own: Tensor) -> Tensor:
    """Pairs in single columns that no listed block has, per row of blocks: int64 `[batch, num_heads, num_q_blocks]`.

    `own` says which rows list their own block.
    """
    size, first, end = selection.block_size, q_offset // selection.block_size, q_offset + q_len
    num_blocks = -(-end // size)
    rows = torch.arange(first, num_blocks, device=columns.device)
    begins, ends = (rows * size).clamp_min(q_offset), ((rows + 1) * size).clamp_max(end)
    block = torch.where(columns < 0, num_blocks, columns // size)
    in_block = torch.zeros(*own.shape[:2], num_blocks + 1, dtype=torch.int32, device=columns.device)
    in_block = in_block.scatter_add_(-1, block, torch.ones_like(block, dtype=torch.int32))[..., :num_blocks]
    earlier = torch.arange(num_blocks, device=columns.device) < rows[:, None]
    open_blocks = ~selection.block_mask(num_blocks) & earlier
    pairs = torch.where(open_blocks, in_block[:, :, None], 0).sum(-1) * (ends - begins)
    # In its own row of blocks the queries from it on read a column.
    row = (block - first).clamp(0, len(rows) - 1)
    later = (ends[row] - torch.maximum(begins[row], columns)).clamp_min(0)
    counts = (columns >= 0) & (block >= first) & ~own.gather(-1, row)
    return pairs.scatter_add_(-1, row, torch.where(counts, later, 0))
