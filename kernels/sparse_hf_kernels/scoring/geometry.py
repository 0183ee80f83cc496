"""Blocks of a causal prefill chunk, in absolute positions: every chunking of a sequence sees the same blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """Query blocks of one chunk and the KV blocks before them.

    Args:
        block_size: tokens per block, for queries and keys alike; block b holds positions [b, b + 1) * block_size.
        q_len, kv_len: lengths of the chunk and of the keys.
        q_offset: position of the first query.
    """

    block_size: int
    q_len: int
    kv_len: int
    q_offset: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block_size: int, q_offset: int | None) -> BlockGrid:
        """From `q [B, Hq, q_len, D]` and `k [B, Hkv, kv_len, D]`; by default the queries are the last tokens.

        Raises:
            ValueError: if the shapes do not fit each other, or the queries do not lie among the keys.
        """
        if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise ValueError(
                f"expected q [batch, num_heads, q_len, head_dim] and k [batch, num_kv_heads, kv_len, head_dim], "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if q.shape[1] % k.shape[1] or q.dtype != k.dtype or q.device != k.device:
            raise ValueError(
                f"expected num_heads a multiple of num_kv_heads and equal dtypes and devices, got {q.shape[1]} and "
                f"{k.shape[1]} heads, {q.dtype} and {k.dtype}, {q.device} and {k.device}"
            )
        q_len, kv_len = q.shape[2], k.shape[2]
        offset = kv_len - q_len if q_offset is None else q_offset
        if not 0 <= offset <= kv_len - q_len or q_len == 0:
            raise ValueError(
                f"queries must lie among the keys: 0 < q_len and 0 <= q_offset <= kv_len - q_len, "
                f"got q_len {q_len}, kv_len {kv_len}, q_offset {offset}"
            )
        return cls(block_size=block_size, q_len=q_len, kv_len=kv_len, q_offset=offset)

    @property
    def first_block(self) -> int:
        """The block of the first query."""
        return self.q_offset // self.block_size

    @property
    def num_q_blocks(self) -> int:
        """Blocks that hold a query; the first and the last may be partial."""
        return -(-(self.q_offset + self.q_len) // self.block_size) - self.first_block

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)


def require_contiguous_rows(**tensors: Tensor) -> None:
    """The kernels read whole rows of the last dimension; the other strides are free.

    Raises:
        ValueError: naming the tensor whose last stride is not 1.
    """
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must have stride 1 in its last dimension, got strides {tensor.stride()}; "
                f"call {name}.contiguous() first"
            )
