"""What each KV head reads: closed-form windows and sinks, or compact lists of blocks. Never an N x N mask.

Conventions. A query at position i reads a key at position j only if j <= i, unless the layout is not causal. A window
of W reads |i - j| < W (itself included); `num_sink_tokens` reads j < num_sink_tokens. Positions count the real tokens
of one sequence from 0, whatever padding, packing, chunking or eviction did to where the tokens lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

UNBOUNDED = 2**31 - 1
"""A window that reaches the start of any sequence; fits int32 for the kernels."""


@dataclass(frozen=True, kw_only=True)
class BlockList:
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
    def is_causal(self) -> bool:
        """No row lists a block that begins after it."""
        ends = (self.indices[end - 1] if end > begin else 0 for begin, end in pairwise(self.row_ptr))
        return all(last <= row for row, last in enumerate(ends))

    @property
    def num_rows(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def max_seq_len(self) -> int:
        """The longest sequence, in tokens, that the list describes."""
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


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """What one head reads: (window or sinks) when `blocks` is None, else the listed blocks."""

    window: int = UNBOUNDED
    num_sink_tokens: int = 0
    blocks: BlockList | None = None

    def __post_init__(self) -> None:
        if not 0 < self.window <= UNBOUNDED:
            raise ValueError(f"window must lie in [1, {UNBOUNDED}], got {self.window}")
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens must not be negative, got {self.num_sink_tokens}")

    @property
    def is_dense(self) -> bool:
        return self.blocks is None and self.window == UNBOUNDED

    def keeps(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Boolean, broadcast over both: may the query read the key? Causality and sequence borders apart."""
        if self.blocks is None:
            return ((q_positions - k_positions).abs() < self.window) | (k_positions < self.num_sink_tokens)
        table = self.blocks.mask.to(q_positions.device)
        last = self.blocks.num_rows - 1
        rows = (q_positions // self.blocks.block_size).clamp(0, last)
        columns = (k_positions // self.blocks.block_size).clamp(0, last)
        return table[rows, columns]


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """The patterns of one layer's KV heads.

    Args:
        patterns: one per KV head; all query heads of its group follow it.
        max_distance: keys at |i - j| >= max_distance are never read, whatever the pattern: a model's own window.
        num_dense_rows: queries at positions below it read every key; where a break-even length is set, it stands here.
        causal: queries read no later key.
    """

    patterns: tuple[HeadPattern, ...]
    max_distance: int = UNBOUNDED
    num_dense_rows: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("a layout needs at least one head pattern")
        if self.max_distance <= 0 or self.num_dense_rows < 0:
            raise ValueError(
                f"max_distance must be positive and num_dense_rows not negative, "
                f"got {self.max_distance} and {self.num_dense_rows}"
            )

        if not self.causal and self.num_dense_rows:
            raise ValueError("num_dense_rows is a prefix of causal attention; leave it 0 without causality")
        for pattern in self.patterns if self.causal else ():
            if pattern.blocks is not None and not pattern.blocks.is_causal:
                raise ValueError(
                    "a block list keeps blocks after the diagonal; apply .tril() to its mask, or set causal=False"
                )

    @classmethod
    def dense(cls, num_kv_heads: int, max_distance: int = UNBOUNDED, causal: bool = True) -> AttentionLayout:
        return cls(patterns=(HeadPattern(),) * num_kv_heads, max_distance=max_distance, causal=causal)

    @property
    def num_kv_heads(self) -> int:
        return len(self.patterns)

    @cached_property
    def groups(self) -> tuple[tuple[HeadPattern, tuple[int, ...]], ...]:
        """Each distinct pattern with the KV heads that follow it, in order of first appearance."""
        heads: dict[HeadPattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            heads.setdefault(pattern, []).append(head)
        return tuple((pattern, tuple(members)) for pattern, members in heads.items())

    @property
    def is_dense(self) -> bool:
        return all(pattern.is_dense for pattern in self.patterns)

    def select(self, heads: Sequence[int]) -> AttentionLayout:
        """The layout of these KV heads alone, in the order given."""
        return replace(self, patterns=tuple(self.patterns[head] for head in heads))

    def allowed(self, pattern: HeadPattern, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """`pattern.keeps` under causality and this layout's `max_distance` and `num_dense_rows`; same broadcasting."""
        keep = pattern.keeps(q_positions, k_positions)
        if self.num_dense_rows:
            keep = keep | (q_positions < self.num_dense_rows)
        if self.max_distance < UNBOUNDED:
            keep = keep & ((q_positions - k_positions).abs() < self.max_distance)
        if self.causal:
            keep = keep & (k_positions <= q_positions)
        return keep

    def row_counts(self, pattern: HeadPattern, seq_len: int) -> Tensor:
        """Exact number of keys that each query of one sequence reads: int64 `[seq_len]`.

        Raises:
            ValueError: if a block list does not cover `seq_len`, or without causality.
        """
        if not self.causal:
            raise ValueError("row_counts counts causal attention only; this layout is not causal")
        last = torch.arange(seq_len)  # the last readable key of each query, its own
        first = (last - self.max_distance + 1).clamp_min(0)
        if pattern.blocks is None:
            recent = torch.maximum(first, last - pattern.window + 1)
            sinks = (torch.minimum(recent, torch.tensor(pattern.num_sink_tokens)) - first).clamp_min(0)
            counts = last - recent + 1 + sinks
        else:
            counts = _block_row_counts(pattern.blocks, first, last)
        return torch.where(last < self.num_dense_rows, last - first + 1, counts)


def _block_row_counts(blocks: BlockList, first: Tensor, last: Tensor) -> Tensor:
    size = blocks.block_size
    if len(last) > blocks.max_seq_len:
        raise ValueError(f"the explicit pattern covers {blocks.max_seq_len} tokens, got {len(last)}")
    counts = torch.zeros_like(last)
    for row in range(-(-len(last) // size)):
        rows = slice(row * size, min((row + 1) * size, len(last)))
        for column in blocks.indices[blocks.row_ptr[row] : blocks.row_ptr[row + 1]]:
            begin = first[rows].clamp_min(column * size)
            end = last[rows].clamp_max((column + 1) * size - 1)
            counts[rows] += (end - begin + 1).clamp_min(0)
    return counts
