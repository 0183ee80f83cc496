"""`explicit`: the user's own block pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import BlockList, HeadPattern


@dataclass(frozen=True, kw_only=True)
class Explicit(Method):
    """A list of KV blocks per query block, in compressed sparse rows; causality is kept inside the diagonal block.

    Blocks are counted in a sequence's own positions. A longer sequence than the pattern covers is refused.

    Args:
        block_size: tokens per block.
        row_ptr: `num_rows + 1` offsets into `indices`.
        indices: KV block numbers, ascending in each row, none after the row's own.
    """

    name: ClassVar[str] = "explicit"
    summary: ClassVar[str] = "the blocks that you list"
    source: ClassVar[str] = "block-sparse rows as in FlexAttention's BlockMask, arXiv 2412.05496, section 4"

    block_size: int = 64
    row_ptr: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "block_size")
        for name in ("row_ptr", "indices"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
                raise ValueError(f"explicit: {name} must be a list of integers, got {str(values)[:80]}")
            object.__setattr__(self, name, tuple(values))  # JSON and YAML give lists
        if not self.row_ptr:
            raise ValueError("explicit: give row_ptr and indices, or build it with Explicit.from_block_mask(mask, ...)")
        if not self.blocks.is_causal:
            raise ValueError(
                "explicit: the mask keeps blocks after the diagonal, which causal attention never reads; apply .tril()"
            )

    @cached_property
    def blocks(self) -> BlockList:
        return BlockList(block_size=self.block_size, row_ptr=self.row_ptr, indices=self.indices)

    @classmethod
    def from_block_mask(cls, mask: Tensor, *, block_size: int) -> Explicit:
        """From a boolean `[num_rows, num_rows]` block mask.

        Raises:
            ValueError: if it is not square and boolean, or keeps blocks after the diagonal.
        """
        blocks = BlockList.from_mask(mask, block_size)
        return cls(block_size=block_size, row_ptr=blocks.row_ptr, indices=blocks.indices)

    @classmethod
    def from_csr(cls, matrix: Tensor, *, block_size: int) -> Explicit:
        """From a `torch.sparse_csr` block matrix `[num_rows, num_rows]`; stored entries are kept, whatever their value.

        Raises:
            ValueError: if it is not a square CSR tensor, or stores entries after the diagonal.
        """
        if matrix.layout != torch.sparse_csr or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"expected a square torch.sparse_csr tensor, got {matrix.layout} of shape {tuple(matrix.shape)}"
            )
        return cls(
            block_size=block_size,
            row_ptr=tuple(matrix.crow_indices().tolist()),
            indices=tuple(matrix.col_indices().tolist()),
        )

    @classmethod
    def from_bcsr(cls, matrix: Tensor) -> Explicit:
        """From a token-level `torch.sparse_bsr` mask with square blocks, whose size becomes `block_size`.

        Stored blocks are kept; a block stored on the diagonal may leave out what lies after it.

        Raises:
            ValueError: if it is not a square BSR matrix of square blocks, stores blocks after the diagonal, or one that
                keeps only part of its earlier keys: this method is exact to its blocks.
        """
        if matrix.layout != torch.sparse_bsr or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"expected a square torch.sparse_bsr tensor, got {matrix.layout} of shape {tuple(matrix.shape)}"
            )
        values, crow, columns = matrix.values(), matrix.crow_indices(), matrix.col_indices()
        size = values.shape[-1]
        if values.shape[-2] != size:
            raise ValueError(f"expected square blocks, got {tuple(values.shape[-2:])}")
        rows = torch.arange(len(crow) - 1, device=crow.device).repeat_interleave(crow.diff())
        needed = torch.ones(size, size, dtype=torch.bool, device=values.device)
        needed = torch.where((rows == columns)[:, None, None], needed.tril(), needed)
        partial = (needed & (values == 0)).flatten(1).any(1).nonzero().flatten().tolist()
        if partial:
            raise ValueError(
                f"explicit is exact to its blocks, but {len(partial)} of {len(rows)} stored blocks keep part of their "
                f"pairs, the first at block row {int(rows[partial[0]])}, column {int(columns[partial[0]])}; take "
                "smaller blocks, or a method with a window"
            )
        return cls(block_size=size, row_ptr=tuple(crow.tolist()), indices=tuple(columns.tolist()))

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern(blocks=self.blocks)
