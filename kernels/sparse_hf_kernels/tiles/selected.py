"""Tables for patterns that are selected per call: made on the device, which nothing here waits for.

Queries and keys stand at the positions of one sequence and the blocks of a selection begin at tile borders, so the
block on the diagonal is the only one that needs a mask. What does not depend on the selection (the rows of the other
heads, and the schedule) is made once per length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.selection import transpose_lists
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.tiles.geometry import RowGeometry

LARGEST_WINDOW = 2**30
"""As in `tiles.table`: a window that reaches everything, within int32."""


@dataclass(frozen=True, kw_only=True)
class SelectedLists:
    """A selection as tiles walk it.

    Args:
        counts: int32 `[batch, num_heads, num_lines]`; a line is a block of queries, or of keys when transposed.
        indices: int32 `[batch, num_heads, num_lines, capacity]`: of a block of queries the blocks of keys, ascending;
            of a block of keys the blocks of queries, descending. Either way the masked one comes last.
        size: tokens per block.
        first_block: block of the first query.
    """

    counts: Tensor
    indices: Tensor
    size: int
    first_block: int
    transposed: bool

    @classmethod
    def of(
        cls, selection: BlockSelection, geometry: RowGeometry, transposed: bool, others: Tensor | None = None
    ) -> SelectedLists:
        """The lists of a call; those of the `others`, boolean `[num_heads]`, may hold anything and are left out.

        Raises:
            ValueError: unless the rows begin with a block of one unpadded sequence.
        """
        size = selection.block_size
        if not geometry.is_closed_form or geometry.start != 0 or geometry.offset % size:
            raise ValueError(
                f"selected blocks become tiles only for unpadded sequences whose first query begins a block of {size}"
            )
        counts, indices = selection.counts.contiguous(), selection.indices.contiguous()
        if others is not None:
            counts = counts.masked_fill(others[:, None], 0)
        if transposed:
            counts, indices = transpose_lists(counts, indices, -(-geometry.kv_len // size), descending=True)
            counts, indices = counts.contiguous(), indices.contiguous()
        first = geometry.offset // size
        return cls(counts=counts, indices=indices, size=size, first_block=first, transposed=transposed)

    def per_block(self, tile_m: int, tile_n: int) -> int:
        """Tiles that a block of the lists is cut into.

        Raises:
            ValueError: unless tiles divide blocks.
        """
        if self.size % tile_m or self.size % tile_n:
            raise ValueError(f"tiles of {tile_m} x {tile_n} do not divide blocks of {self.size}")
        return self.size // (tile_m if self.transposed else tile_n)

    def flat(self, tile_m: int, tile_n: int) -> Tensor:
        """int32: all lists, blocks cut into tiles, in the order in which a tile walks them.

        Raises:
            ValueError: if there are more entries than int32 can number.
        """
        parts, indices = self.per_block(tile_m, tile_n), self.indices
        if indices.numel() * parts >= 2**31:
            raise ValueError(
                f"a selection of {indices.numel()} list entries is beyond what kernels can address; prefill in chunks"
            )
        if parts > 1:
            inner = torch.arange(parts, device=indices.device, dtype=torch.int32)
            indices = indices[..., None] * parts + (inner.flip(0) if self.transposed else inner)
        return indices.reshape(-1)


def selected_rows(
    lists: SelectedLists, fixed: Tensor, pattern_of_head: Tensor, geometry: RowGeometry, tile_m: int, tile_n: int,
    list_base: int,
) -> Tensor:  # fmt: skip
    """Rows of a table, int32 `[batch * num_heads * num_tiles, 16]`.

    Args:
        fixed: int32 `[patterns, num_tiles, 16]`, rows of the patterns that are not selected.
        pattern_of_head: int32 `[num_heads]`: row of `fixed`, -1 for selected heads.
        list_base: where the flat lists of the selection begin.
    """
    num_tiles = fixed.shape[1]
    lists.per_block(tile_m, tile_n)
    if lists.counts.device.type == "cuda":
        from sparse_hf_kernels.tiles.selected_kernels import fill_rows

        return fill_rows(
            lists.counts, lists.indices, fixed, pattern_of_head, num_tiles, size=lists.size, tile_m=tile_m,
            tile_n=tile_n, first_block=lists.first_block, q_len=geometry.q_len, list_base=list_base,
            transposed=lists.transposed,
        )  # fmt: skip
    return selected_rows_naive(lists, fixed, pattern_of_head, geometry, tile_m, tile_n, list_base)


def selected_rows_naive(
    lists: SelectedLists, fixed: Tensor, pattern_of_head: Tensor, geometry: RowGeometry, tile_m: int, tile_n: int,
    list_base: int,
) -> Tensor:  # fmt: skip
    """`selected_rows` in plain torch."""
    num_tiles, size, per_block = fixed.shape[1], lists.size, lists.per_block(tile_m, tile_n)
    tile = torch.arange(num_tiles, device=fixed.device)
    # Of the block on the diagonal: the parts that the tile visits, and those among them without a mask.
    if lists.transposed:
        line = tile * tile_n // size
        own, inner = line - lists.first_block, tile * tile_n - line * size
        # Its queries count from the block's first: those before the tile's keys read none of them.
        seen = per_block - inner // tile_m
        full = (per_block - -(-(inner + tile_n - 1) // tile_m)).clamp_min(0)
    else:
        line = tile * tile_m // size
        own, inner = line + lists.first_block, tile * tile_m - line * size
        last = torch.minimum(inner + tile_m, geometry.q_len - line * size) - 1
        seen, full = last // tile_n + 1, (inner + 1) // tile_n
    counts = lists.counts[:, :, line].long()
    end = lists.indices[:, :, line].gather(-1, (counts - 1).clamp_min(0)[..., None]).squeeze(-1)
    has_own = ((counts > 0) & (end == own)).long()
    before = (counts - has_own) * per_block
    lines = torch.arange(lists.counts.numel(), device=fixed.device).view(lists.counts.shape)[:, :, line]
    at = lines * lists.indices.shape[-1] * per_block + list_base
    zero = torch.zeros_like(at)
    num_full, num_blocks = before + has_own * full, before + has_own * seen
    row = (tile.expand_as(at), at, *[num_full] * 2, *[num_blocks] * 4, *[zero] * 6, zero + LARGEST_WINDOW, zero)
    selected = torch.stack(row, -1).to(torch.int32)
    others = fixed[pattern_of_head.clamp_min(0).long()].expand_as(selected)
    return torch.where((pattern_of_head < 0)[:, None, None], selected, others).flatten(0, 2)
