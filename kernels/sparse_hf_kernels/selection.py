"""What dynamic methods choose in each call: compact lists of blocks, and single columns, per query head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK_SIZES = (64, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSelection:
    """The keys that queries of `selected` patterns read, besides causality. Entries of other heads are ignored.

    Block b of queries or keys holds the positions [b, b + 1) * block_size; the first row of blocks is the one that
    holds the call's first query. Queries and keys stand at the positions of one unpadded sequence per batch row.

    Args:
        block_size: 64 or 128 tokens; 128 is what the fused kernels are made for.
        counts: int32 `[batch, num_heads, num_q_blocks]`.
        indices: int32 `[batch, num_heads, num_q_blocks, capacity]`: the first `counts` of a row are KV blocks,
            ascending, none after the row's own; the others are unspecified.
        columns: int32 `[batch, num_heads, num_columns]`: key positions that every later query reads besides, in any
            order without repeats; -1 for none. None where no head has any.
        num_dense_rows: queries at positions below it have every block listed: see `with_dense_rows`.
    """

    block_size: int
    counts: Tensor
    indices: Tensor
    columns: Tensor | None = None
    num_dense_rows: int = 0

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        counts, indices, columns = self.counts, self.indices, self.columns
        if counts.ndim != 3 or indices.ndim != 4 or indices.shape[:3] != counts.shape:
            raise ValueError(
                f"expected counts [batch, num_heads, num_q_blocks] and indices with one more dimension, "
                f"got {tuple(counts.shape)} and {tuple(indices.shape)}"
            )
        if columns is not None and (columns.ndim != 3 or columns.shape[:2] != counts.shape[:2]):
            raise ValueError(
                f"expected columns [{counts.shape[0]}, {counts.shape[1]}, num_columns], got {tuple(columns.shape)}"
            )
        wrong = {x.dtype for x in (counts, indices, columns) if x is not None} - {torch.int32}
        if wrong:
            raise ValueError(f"counts, indices and columns must be int32, got {sorted(map(str, wrong))}")

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int, columns: Tensor | None = None) -> BlockSelection:
        """From a boolean `[batch, num_heads, num_q_blocks, num_kv_blocks]` block mask."""
        counts = mask.sum(-1, dtype=torch.int32)
        blocks = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32)
        indices = torch.where(mask, blocks, mask.shape[-1]).sort(-1).values
        return cls(block_size=block_size, counts=counts, indices=indices.to(torch.int32), columns=columns)

    @property
    def num_heads(self) -> int:
        return self.counts.shape[1]

    def block_mask(self, num_kv_blocks: int) -> Tensor:
        """Boolean `[batch, num_heads, num_q_blocks, num_kv_blocks]`."""
        listed = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        # A spare column takes what is not listed.
        where = torch.where(listed, self.indices, num_kv_blocks).long()
        mask = torch.zeros(*self.counts.shape, num_kv_blocks + 1, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, where, True)[..., :num_kv_blocks]

    def keeps(self, rows: slice, q_offset: int, kv_len: int) -> Tensor:
        """Boolean `[batch, num_heads, rows, kv_len]`: what queries `rows` of the call read, causality apart."""
        size = self.block_size
        mask = self.block_mask(-(-kv_len // size))
        q_blocks = (torch.arange(rows.start, rows.stop, device=mask.device) + q_offset) // size - q_offset // size
        keep = mask[:, :, q_blocks].repeat_interleave(size, -1)[..., :kv_len]
        if self.columns is not None:
            columns = self.columns.long()
            single = torch.zeros(*columns.shape[:2], kv_len + 1, dtype=torch.bool, device=mask.device)
            single.scatter_(-1, torch.where(columns < 0, kv_len, columns), True)
            keep = keep | single[:, :, None, :kv_len]
        return keep

    def select(self, heads: list[int]) -> BlockSelection:
        """The lists of these query heads alone, in the order given."""
        if heads == list(range(self.num_heads)):
            return self
        columns = None if self.columns is None else self.columns[:, heads]
        return replace(self, counts=self.counts[:, heads], indices=self.indices[:, heads], columns=columns)

    def with_dense_rows(self, num_rows: int, q_offset: int) -> BlockSelection:
        """Queries at positions below `num_rows`, rounded up to whole blocks, read every block up to their own.

        Layouts with `num_dense_rows` take selections that have as many.
        """
        first = q_offset // self.block_size
        num_dense = min(max(-(-num_rows // self.block_size) - first, 0), self.counts.shape[2])
        if num_dense == 0:
            return self
        room = max(first + num_dense - self.indices.shape[-1], 0)
        counts, indices = self.counts.clone(), torch.nn.functional.pad(self.indices, (0, room))
        indices = indices if room else indices.clone()
        own = torch.arange(first, first + num_dense, device=counts.device, dtype=torch.int32)
        counts[:, :, :num_dense] = own + 1
        every = torch.arange(first + num_dense, device=counts.device, dtype=torch.int32)
        indices[:, :, :num_dense, : first + num_dense] = every
        return replace(self, counts=counts, indices=indices, num_dense_rows=max(num_rows, self.num_dense_rows))

    def expand(self, batch: int) -> BlockSelection:
        """With `batch` rows, where it has one for all."""
        if len(self.counts) == batch:
            return self
        columns = None if self.columns is None else self.columns.expand(batch, -1, -1)
        return replace(
            self,
            counts=self.counts.expand(batch, -1, -1),
            indices=self.indices.expand(batch, -1, -1, -1),
            columns=columns,
        )
