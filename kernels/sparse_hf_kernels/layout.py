"""What each KV head reads: closed-form windows and sinks, or compact lists of blocks. Never an N x N mask.

Conventions. A query at position i reads a key at position j only if j <= i, unless the layout is not causal. A window
of W reads |i - j| < W (itself included); `num_sink_tokens` reads j < num_sink_tokens. Positions count the real tokens
of one sequence from 0, whatever padding, packing, chunking or eviction did to where the tokens lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from sparse_hf_kernels.blocks import BlockRule
from sparse_hf_kernels.counts import block_counts, row_counts

UNBOUNDED = 2**31 - 1
"""A window that reaches the start of any sequence; fits int32 for the kernels."""


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """What one head reads.

    Args:
        window, num_sink_tokens: the closed form, when neither of the next two says otherwise.
        blocks: the blocks of a rule instead.
        selected: the blocks that a `BlockSelection`, which comes with each call, lists for the head instead.
        num_last_tokens: the queries at the last so many positions of each sequence read every key. A sequence is as
            long as its keys in the call: chunks of a prefill each have their last rows, and decoding reads all.
    """

    window: int = UNBOUNDED
    num_sink_tokens: int = 0
    blocks: BlockRule | None = None
    selected: bool = False
    num_last_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.window <= UNBOUNDED:
            raise ValueError(f"window must lie in [1, {UNBOUNDED}], got {self.window}")
        if not (0 <= self.num_sink_tokens <= UNBOUNDED and 0 <= self.num_last_tokens <= UNBOUNDED):
            raise ValueError(
                f"num_sink_tokens and num_last_tokens must lie in [0, {UNBOUNDED}], "
                f"got {self.num_sink_tokens} and {self.num_last_tokens}"
            )
        closed = self.window < UNBOUNDED or self.num_sink_tokens
        if (self.blocks is not None) + bool(closed) + self.selected > 1:
            raise ValueError("a pattern has a window and sinks, or blocks, or is selected per call; give one of them")
        if self.num_last_tokens and (self.selected or self.blocks is not None):
            raise ValueError("num_last_tokens goes with windows and sinks; put such rows into the blocks or selection")

    @property
    def is_dense(self) -> bool:
        return self.blocks is None and not self.selected and self.window == UNBOUNDED

    def keeps(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Boolean, broadcast over both: may the query read the key?

        Causality, sequence borders, last rows and what is selected per call apart.
        """
        if self.blocks is None:
            return ((q_positions - k_positions).abs() < self.window) | (k_positions < self.num_sink_tokens)
        size = self.blocks.block_size
        return self.blocks.keeps((q_positions // size).clamp_min(0), (k_positions // size).clamp_min(0))


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

        last_rows = {p.num_last_tokens for p in self.patterns if p.num_last_tokens}
        if len(last_rows) > 1:
            raise ValueError(
                f"the patterns of a layer must share num_last_tokens or have none, got {sorted(last_rows)}"
            )
        if not self.causal and (self.num_dense_rows or any(p.selected or p.num_last_tokens for p in self.patterns)):
            raise ValueError(
                "dense rows (num_dense_rows, num_last_tokens) and selected patterns belong to causal attention; "
                "leave them out without causality"
            )
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

    @cached_property
    def dense_len(self) -> int:
        """Sequences of up to so many tokens are dense in every head; 0 without causality or with a selection."""
        if not self.causal or self.selects:
            return 0
        first_rows = (0 if p.blocks is not None else p.window + p.num_sink_tokens for p in self.patterns)
        last_rows = (pattern.num_last_tokens for pattern in self.patterns)
        lengths = (max(self.num_dense_rows, first) + last for first, last in zip(first_rows, last_rows, strict=True))
        return min(self.max_distance, *lengths)

    @cached_property
    def whole_len(self) -> int:
        """`dense_len`, of layouts with a selection too: below `num_dense_rows` nothing is selected."""
        return max(self.dense_len, min(self.num_dense_rows, self.max_distance))

    @cached_property
    def all_dense(self) -> AttentionLayout:
        """What dense rows follow: every head reads all within `max_distance`."""
        return AttentionLayout.dense(self.num_kv_heads, self.max_distance, self.causal)

    @cached_property
    def without_dense_rows(self) -> AttentionLayout:
        """What later queries follow."""
        return replace(self, num_dense_rows=0) if self.num_dense_rows else self

    @cached_property
    def num_last_tokens(self) -> int:
        """That of the patterns that have dense last rows; 0 if none has."""
        return max(pattern.num_last_tokens for pattern in self.patterns)

    @property
    def selects(self) -> bool:
        """Some head reads what a `BlockSelection` lists."""
        return any(pattern.selected for pattern in self.patterns)

    def select(self, heads: Sequence[int]) -> AttentionLayout:
        """The layout of these KV heads alone, in the order given."""
        return replace(self, patterns=tuple(self.patterns[head] for head in heads))

    def allowed(
        self, pattern: HeadPattern, q_positions: Tensor, k_positions: Tensor, last: Tensor | int | None = None
    ) -> Tensor:
        """`pattern.keeps` under causality and this layout's `max_distance` and `num_dense_rows`; same broadcasting.

        `last`, the position of the last key of each query's sequence, is read for `num_last_tokens` only.
        """
        keep = pattern.keeps(q_positions, k_positions)
        if self.num_dense_rows:
            keep = keep | (q_positions < self.num_dense_rows)
        if pattern.num_last_tokens:
            if last is None:
                raise ValueError("num_last_tokens counts from the end of a sequence; say where its last key stands")
            keep = keep | (q_positions > last - pattern.num_last_tokens)
        if self.max_distance < UNBOUNDED:
            keep = keep & ((q_positions - k_positions).abs() < self.max_distance)
        if self.causal:
            keep = keep & (k_positions <= q_positions)
        return keep

    def row_counts(self, pattern: HeadPattern, seq_len: int) -> Tensor:
        """Exact number of keys that each query of one sequence reads: int64 `[seq_len]`.

        Raises:
            ValueError: if a block list does not cover `seq_len`, or for a selected pattern.
        """
        return row_counts(self, pattern, seq_len)

    def block_counts(self, pattern: HeadPattern, seq_len: int, block_size: int) -> Tensor:
        """Exact number of pairs that one sequence keeps in each block: int64 `[num_blocks, num_blocks]`.

        Raises:
            ValueError: as `row_counts`.
        """
        return block_counts(self, pattern, seq_len, block_size)
