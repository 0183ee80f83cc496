"""Where the tokens of a batch stand in their sequences: the one description that all paths share.

Training, packing, left and right padding, chunked prefill and decoding from an evicted cache differ only in these
tensors. A pattern is a statement about positions, so every path reads the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """Positions of queries and keys, counted from 0 in each token's own sequence; -1 marks a slot that holds no token.

    Args:
        q_positions: integer `[batch or 1, q_len]`. A row with no key (padding) gives output 0.
        k_positions: integer `[batch or 1, kv_len]`.
        q_segments, k_segments: integer, same shapes: which packed sequence a token belongs to. None when every row of
            the batch holds one sequence.
    """

    q_positions: Tensor
    k_positions: Tensor
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None

    def __post_init__(self) -> None:
        if self.q_positions.ndim != 2 or self.k_positions.ndim != 2:
            raise ValueError(
                f"positions must be [batch, length], got {tuple(self.q_positions.shape)} "
                f"and {tuple(self.k_positions.shape)}"
            )
        if (self.q_segments is None) != (self.k_segments is None):
            raise ValueError("give q_segments and k_segments together, or neither")

    @classmethod
    def causal(cls, q_len: int, kv_len: int, device: torch.device | str | None = None) -> TokenPositions:
        """One unpadded sequence a row whose queries are its last `q_len` tokens (prefill, a chunk of it, or decode).

        Raises:
            ValueError: if there are more queries than keys.
        """
        if q_len > kv_len:
            raise ValueError(f"causal attention needs q_len <= kv_len, got {q_len} > {kv_len}")
        keys = torch.arange(kv_len, device=device)[None]
        return cls(q_positions=keys[:, kv_len - q_len :], k_positions=keys)

    @classmethod
    def from_padding_mask(cls, mask: Tensor, q_len: int | None = None) -> TokenPositions:
        """From a boolean `[batch, kv_len]` mask of real tokens, padded anywhere; queries are the last `q_len`."""
        mask = mask.bool()
        keys = (mask.cumsum(-1) - 1).masked_fill(~mask, -1)
        return cls(q_positions=keys[:, keys.shape[1] - (q_len or keys.shape[1]) :], k_positions=keys)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> TokenPositions:
        """One row of packed sequences; `cu_seqlens [num_sequences + 1]` are their borders, from 0 to the total."""
        lengths = cu_seqlens.diff()
        segments = torch.arange(len(lengths), device=cu_seqlens.device).repeat_interleave(lengths)
        index = torch.arange(len(segments), device=cu_seqlens.device)
        keys = (index - cu_seqlens[segments])[None]
        return cls(q_positions=keys, k_positions=keys, q_segments=segments[None], k_segments=segments[None])

    @cached_property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence up to its last query; read from the device once."""
        return int(self.q_positions.max()) + 1 if self.q_positions.numel() else 0

    def visible(self, rows: slice) -> Tensor:
        """Boolean `[batch or 1, rows, kv_len]`: real tokens of the same sequence, not after the query."""
        q, k = self.q_positions[:, rows, None], self.k_positions[:, None, :]
        visible = (k >= 0) & (k <= q)
        if self.q_segments is not None and self.k_segments is not None:
            visible = visible & (self.q_segments[:, rows, None] == self.k_segments[:, None, :])
        return visible
