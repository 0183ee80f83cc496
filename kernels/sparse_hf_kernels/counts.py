"""Exact counts of what a pattern keeps in one sequence, by formula: no matrix of queries by keys is formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.blocks import BlockRule

if TYPE_CHECKING:
    from sparse_hf_kernels.layout import AttentionLayout, HeadPattern

MAX_ELEMENTS = 2**22
"""Of the tensors that are formed at a time."""


def keys_below(layout: AttentionLayout, pattern: HeadPattern, seq_len: int, rows: Tensor, limits: Tensor) -> Tensor:
    """How many keys at positions below each limit the queries at positions `rows` read.

    Args:
        layout: which has the pattern.
        pattern: of a head.
        seq_len: tokens of the sequence.
        rows: int64 `[num_rows]`, in [0, seq_len).
        limits: int64 `[num_limits]`, in [0, seq_len].

    Returns:
        int64 `[num_rows, num_limits]`.

    Raises:
        ValueError: for a pattern that is selected per call, or a block list that does not cover `seq_len`.
    """
    if pattern.selected:
        raise ValueError("what a selected pattern reads depends on q and k; only static patterns can be counted")
    own = rows[:, None]
    first = (own - layout.max_distance + 1).clamp_min(0)
    end = (own + (1 if layout.causal else layout.max_distance)).clamp_max(seq_len)
    below = torch.minimum(torch.maximum(limits[None], first), end)
    if pattern.blocks is not None:
        counts = _block_keys_below(pattern.blocks, seq_len, rows, torch.cat([first, below], 1))
        counts = counts[:, 1:] - counts[:, :1]
    else:
        near = torch.maximum(first, own - pattern.window + 1)
        far = torch.minimum(end, own + pattern.window)
        sinks = torch.maximum(first, end.clamp_max(pattern.num_sink_tokens))

        def inside(begin: Tensor, stop: Tensor) -> Tensor:
            return (torch.minimum(stop, below) - begin).clamp_min(0)

        both = inside(torch.maximum(near, first), torch.minimum(far, sinks))
        counts = inside(near, far) + inside(first, sinks) - both
    dense = (own < layout.num_dense_rows) | (own >= seq_len - pattern.num_last_tokens)
    return torch.where(dense, below - first, counts)


def row_counts(layout: AttentionLayout, pattern: HeadPattern, seq_len: int) -> Tensor:
    """Exact number of keys that each query of one sequence reads: int64 `[seq_len]`. Raises as `keys_below`."""
    limits = torch.tensor([seq_len])
    parts = [keys_below(layout, pattern, seq_len, rows, limits)[:, 0] for rows in _row_chunks(pattern, seq_len, 1)]
    return torch.cat(parts)


def block_counts(layout: AttentionLayout, pattern: HeadPattern, seq_len: int, block_size: int) -> Tensor:
    """Exact number of kept pairs in each block of queries and keys: int64 `[num_blocks, num_blocks]`.

    Raises as `keys_below`.
    """
    num_blocks = -(-seq_len // block_size)
    limits = (torch.arange(num_blocks + 1) * block_size).clamp_max(seq_len)
    counts = torch.zeros(num_blocks, num_blocks, dtype=torch.int64)
    for rows in _row_chunks(pattern, seq_len, len(limits)):
        counts.index_add_(0, rows // block_size, keys_below(layout, pattern, seq_len, rows, limits).diff(dim=1))
    return counts


def _row_chunks(pattern: HeadPattern, seq_len: int, num_limits: int) -> tuple[Tensor, ...]:
    """Positions of all queries, so many at a time that memory stays bounded."""
    step = max(1, MAX_ELEMENTS // num_limits)
    if pattern.blocks is not None:
        size = pattern.blocks.block_size
        step = min(step, max(1, MAX_ELEMENTS // -(-seq_len // size)) * size)
    return torch.arange(seq_len).split(step)


def _block_keys_below(blocks: BlockRule, seq_len: int, rows: Tensor, limits: Tensor) -> Tensor:
    """Keys of kept blocks at positions below `limits [num_rows, num_limits]`, causality apart."""
    size = blocks.block_size
    if blocks.max_seq_len is not None and seq_len > blocks.max_seq_len:
        raise ValueError(f"the explicit pattern covers {blocks.max_seq_len} tokens, got {seq_len}")
    q_blocks = rows // size
    lowest = int(q_blocks.min())
    table_rows = torch.arange(lowest, int(q_blocks.max()) + 1)
    columns = torch.arange(-(-seq_len // size))
    kept = blocks.keeps(table_rows[:, None], columns[None]).expand(len(table_rows), len(columns)).to(torch.int64)
    before = F.pad(kept.cumsum(1), (1, 0)) * size
    kept = F.pad(kept, (0, 1))  # a limit may lie behind the last block
    row, block = (q_blocks - lowest)[:, None], limits // size
    return before[row, block] + kept[row, block] * (limits % size)
