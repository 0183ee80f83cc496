"""A static method's pattern as `torch.sparse` tensors. `Explicit.from_csr` and `Explicit.from_bcsr` read them back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.methods import HeadPlace, Method
from sparse_hf.methods.base import FIRST_HEAD
from sparse_hf_kernels import AttentionLayout, HeadPattern
from sparse_hf_kernels.counts import keys_below

DEFAULT_BLOCK_SIZE = 64
ROWS_AT_A_TIME = 512


def to_csr(method: Method, seq_len: int, *, block_size: int | None = None, place: HeadPlace = FIRST_HEAD) -> Tensor:
    """The blocks that a head visits in a sequence, as a `torch.sparse_csr` matrix of ones.

    Args:
        method: a static method.
        seq_len: tokens; the last block may be partial.
        block_size: tokens per block; by default the method's own, or 64 where it is exact to tokens. 1 gives the
            token-level mask, for lengths of some thousands.
        place: the head.

    Returns:
        float32 `[num_blocks, num_blocks]`; a block is stored if at least one of its pairs is kept.

    Raises:
        ValueError: for a dynamic method, or lengths that are not positive or beyond an explicit pattern.
    """
    pattern, size = _pattern(method, seq_len, block_size, place)
    visited = _visited(pattern, seq_len, size)
    rows, columns = visited.nonzero().unbind(-1)
    return torch.sparse_csr_tensor(
        _row_ptr(visited),
        columns,
        torch.ones(len(rows)),
        size=visited.shape,
        dtype=torch.float32,
        check_invariants=True,
    )


def to_bcsr(method: Method, seq_len: int, *, block_size: int | None = None, place: HeadPlace = FIRST_HEAD) -> Tensor:
    """The mask of a head, exact to the token, as a `torch.sparse_bsr` matrix of 0 and 1.

    Args:
        method, seq_len, place: as in `to_csr`.
        block_size: tokens per stored block; by default as in `to_csr`.

    Returns:
        float32 `[n, n]`, n being `seq_len` rounded up to whole blocks; rows and columns beyond it are 0.

    Raises:
        ValueError: as `to_csr`.
    """
    pattern, size = _pattern(method, seq_len, block_size, place)
    visited = _visited(pattern, seq_len, size)
    rows, columns = visited.nonzero().unbind(-1)
    inside = torch.arange(size)
    q = (rows[:, None] * size + inside)[:, :, None]
    k = (columns[:, None] * size + inside)[:, None, :]
    kept = AttentionLayout(patterns=(pattern,)).allowed(pattern, q, k, seq_len - 1) & (q < seq_len) & (k < seq_len)
    length = len(visited) * size
    return torch.sparse_bsr_tensor(
        _row_ptr(visited), columns, kept.float(), size=(length, length), dtype=torch.float32, check_invariants=True
    )


def _pattern(method: Method, seq_len: int, block_size: int | None, place: HeadPlace) -> tuple[HeadPattern, int]:
    if seq_len <= 0 or (block_size is not None and block_size <= 0):
        raise ValueError(f"seq_len and block_size must be positive, got {seq_len} and {block_size}")
    if not method.is_static:
        raise ValueError(f"{method.name} is dynamic: what it reads depends on q and k; export a static method")
    pattern = method.pattern(place)
    own = DEFAULT_BLOCK_SIZE if pattern.blocks is None else pattern.blocks.block_size
    return pattern, block_size or own


def _visited(pattern: HeadPattern, seq_len: int, block_size: int) -> Tensor:
    """Boolean `[num_blocks, num_blocks]`."""
    layout, rule = AttentionLayout(patterns=(pattern,)), pattern.blocks
    num_blocks = -(-seq_len // block_size)
    if rule is not None:
        if rule.block_size == block_size and seq_len <= (rule.max_seq_len or seq_len):
            return rule.block_mask(num_blocks).tril()
        return layout.block_counts(pattern, seq_len, block_size) > 0
    # A window moves on with its query: what the first and the last query of a block read is all that the block reads,
    # but for keys between, which lie in the block itself.
    first = torch.arange(num_blocks) * block_size
    limits = (torch.arange(num_blocks + 1) * block_size).clamp_max(seq_len)
    visited = []
    for rows in first.split(ROWS_AT_A_TIME):
        last = (rows + block_size - 1).clamp_max(seq_len - 1)
        counts = [keys_below(layout, pattern, seq_len, edge, limits).diff(dim=1) for edge in (rows, last)]
        visited.append((counts[0] + counts[1]) > 0)
    return torch.cat(visited)


def _row_ptr(mask: Tensor) -> Tensor:
    return F.pad(mask.sum(1).cumsum(0), (1, 0))
