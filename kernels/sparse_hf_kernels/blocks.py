"""Block patterns: which blocks of keys a block of queries reads, by a rule or by an explicit list."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


class BlockRule(ABC):
    """A rule over block numbers, which count from the start of a sequence; the same for every length.

    A subclass is a frozen dataclass: layouts are compared and hashed by its fields.
    """

    block_size: int
    """Tokens per block, for queries and keys alike."""
    max_seq_len: int | None = None
    """The longest sequence, in tokens, that the rule describes; None without a limit."""
    is_causal: bool = True
    """No query block keeps a block after its own."""
    reach: int | None = None
    """Keys at this distance, in tokens, or more are never read, so that a cache may free them; None without a bound."""

    @abstractmethod
    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        """Boolean, broadcast over both int64 tensors, on their device: does the query block read the block of keys?

        Where keys come after queries the answer does not matter to causal layouts.
        """

    def block_mask(self, num_rows: int, device: torch.device | str | None = None) -> Tensor:
        """The boolean `[num_rows, num_rows]` mask of the first blocks."""
        blocks = torch.arange(num_rows, device=device)
        return self.keeps(blocks[:, None], blocks[None]).expand(num_rows, num_rows)


@dataclass(frozen=True, kw_only=True)
class BlockList(BlockRule):
    """Which KV blocks each query block reads, in compressed sparse rows.

    Args:
        block_size: tokens per block, for queries and keys alike.
        row_ptr: `num_rows + 1` offsets into `indices`, beginning at 0 and never falling.
        indices: KV block numbers, ascending within a row. Causal layouts want none after its query block (within the
            diagonal block, causality is kept by position).
    """

    block_size: int
    row_ptr: tuple[int, ...]
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.block_size <= 0:
            raise ValueError(f"block_size must be positive, got {self.block_size}")
        ptr = self.row_ptr
        falls = any(a > b for a, b in pairwise(ptr))
        if len(ptr) < 2 or ptr[0] != 0 or ptr[-1] != len(self.indices) or falls:
            raise ValueError(
                f"row_ptr must begin at 0, never fall and end at the number of indices ({len(self.indices)}); "
                f"got {len(ptr)} entries from {ptr[0] if ptr else None} to {ptr[-1] if ptr else None}"
            )
        for row in range(self.num_rows):
            columns = self.indices[ptr[row] : ptr[row + 1]]
            if any(a >= b for a, b in pairwise(columns)):
                raise ValueError(f"block row {row}: indices must ascend without repeats, got {list(columns)[:8]}")
            if columns and (columns[0] < 0 or columns[-1] >= self.num_rows):
                raise ValueError(
                    f"block row {row}: indices must lie in [0, {self.num_rows}), got {columns[0]} to {columns[-1]}"
                )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Tables are looked up by layout in every call; the tuples can be long.
        return hash((self.block_size, self.row_ptr, self.indices))

    @cached_property
    def is_causal(self) -> bool:  # type: ignore[override]
        ends = (self.indices[end - 1] if end > begin else 0 for begin, end in pairwise(self.row_ptr))
        return all(last <= row for row, last in enumerate(ends))

    @property
    def num_rows(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def max_seq_len(self) -> int:  # type: ignore[override]
        return self.num_rows * self.block_size

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int) -> BlockList:
        """From a boolean `[num_rows, num_rows]` block mask.

        Raises:
            ValueError: if the mask is not a square boolean matrix.
        """
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool:
            raise ValueError(
                f"expected a square boolean block mask [rows, rows], got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        counts = mask.sum(-1).cumsum(0).tolist()
        return cls(block_size=block_size, row_ptr=(0, *counts), indices=tuple(mask.nonzero()[:, 1].tolist()))

    @cached_property
    def mask(self) -> Tensor:
        """The boolean `[num_rows, num_rows]` block mask, on the CPU."""
        mask = torch.zeros(self.num_rows, self.num_rows, dtype=torch.bool)
        counts = torch.tensor(self.row_ptr).diff()
        mask[torch.arange(self.num_rows).repeat_interleave(counts), torch.tensor(self.indices, dtype=torch.long)] = True
        return mask

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        table, last = self.mask.to(q_blocks.device), self.num_rows - 1
        return table[q_blocks.clamp(0, last), k_blocks.clamp(0, last)]
