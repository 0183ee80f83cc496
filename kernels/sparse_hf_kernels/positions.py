"""Where the tokens of a batch stand in their sequences: the one description that all paths share.

Training, packing, left and right padding, chunked prefill and decoding from an evicted cache differ only in these
tensors. A pattern is a statement about positions, so every path reads the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_hf_kernels.capture import may_read


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """Positions of queries and keys, counted from 0 in each token's own sequence; -1 marks a slot that holds no token.

    Args:
        q_positions: integer `[batch or 1, q_len]`. A row with no key (padding) gives output 0.
        k_positions: integer `[batch or 1, kv_len]`.
        q_segments, k_segments: integer, same shapes: which packed sequence a token belongs to. None when every row of
            the batch holds one sequence.
        offset, k_offset: the closed form where there is one, so that kernels need not look: query i stands at
            `i + offset` and key j at `j + k_offset`, with no padding. Given by `causal`.
    """

    q_positions: Tensor
    k_positions: Tensor
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    offset: int | None = None
    k_offset: int = 0

    def __post_init__(self) -> None:
        if self.q_positions.ndim != 2 or self.k_positions.ndim != 2:
            raise ValueError(
                f"positions must be [batch, length], got {tuple(self.q_positions.shape)} "
                f"and {tuple(self.k_positions.shape)}"
            )
        if (self.q_segments is None) != (self.k_segments is None):
            raise ValueError("give q_segments and k_segments together, or neither")

    @classmethod
    def causal(
        cls,
        q_len: int,
        kv_len: int,
        device: torch.device | str | None = None,
        *,
        q_offset: int | None = None,
        k_offset: int = 0,
    ) -> TokenPositions:
        """One unpadded sequence a row: prefill, a chunk of it, or decode. The tensors are made when they are asked for.

        Args:
            q_len, kv_len: number of queries and keys.
            q_offset: position of the first query; by default the queries are the last of the keys.
            k_offset: position of the first key, where a cache dropped the oldest.

        Raises:
            ValueError: if there are more queries than keys and no `q_offset` says where they stand, or for an offset
                below 0.
        """
        if q_offset is None and q_len > kv_len:
            raise ValueError(f"causal attention needs q_len <= kv_len, got {q_len} > {kv_len}; or give q_offset")
        offset = k_offset + kv_len - q_len if q_offset is None else q_offset
        if offset < 0 or k_offset < 0:
            raise ValueError(f"positions count from 0, got q_offset {offset} and k_offset {k_offset}")
        return _ClosedForm(q_len, kv_len, offset, k_offset, device)

    @classmethod
    def from_padding_mask(cls, mask: Tensor, q_len: int | None = None) -> TokenPositions:
        """From a boolean `[batch, kv_len]` mask of real tokens, padded anywhere; queries are the last `q_len`.

        Raises:
            ValueError: if there are more queries than keys.
        """
        mask = mask.bool()
        q_len = mask.shape[1] if q_len is None else q_len
        if not 0 <= q_len <= mask.shape[1]:
            raise ValueError(f"queries are the last of {mask.shape[1]} keys, got q_len {q_len}; give a longer mask")
        keys = (mask.cumsum(-1) - 1).masked_fill(~mask, -1)
        return cls(q_positions=keys[:, keys.shape[1] - q_len :], k_positions=keys)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int | None = None) -> TokenPositions:
        """One row of packed sequences; `cu_seqlens [num_sequences + 1]` are their borders, from 0 to the total.

        `total`, where it is known, spares reading it from the device.
        """
        lengths = cu_seqlens.diff()
        segments = torch.arange(len(lengths), device=cu_seqlens.device).repeat_interleave(lengths, output_size=total)
        index = torch.arange(len(segments), device=cu_seqlens.device)
        keys = (index - cu_seqlens[segments])[None]
        return cls(q_positions=keys, k_positions=keys, q_segments=segments[None], k_segments=segments[None])

    @property
    def q_len(self) -> int:
        return self.q_positions.shape[1]

    @property
    def kv_len(self) -> int:
        return self.k_positions.shape[1]

    @property
    def batches(self) -> tuple[int, int]:
        """Rows of the positions of queries and keys."""
        return self.q_positions.shape[0], self.k_positions.shape[0]

    @cached_property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence up to its last query; read from the device once, without a closed form."""
        if self.offset is not None:
            return self.offset + self.q_len
        if not may_read():
            raise ValueError(
                "an explicit pattern covers sequences up to a length, which positions given as tensors must be "
                "compared with and cannot while a CUDA graph is captured; give q_offset or TokenPositions.causal"
            )
        return int(self.q_positions.max()) + 1 if self.q_positions.numel() else 0

    def visible(self, rows: slice) -> Tensor:
        """Boolean `[batch or 1, rows, kv_len]`: pairs of real tokens of the same sequence."""
        q, k = self.q_positions[:, rows, None], self.k_positions[:, None, :]
        visible = (k >= 0) & (q >= 0)
        if self.q_segments is not None and self.k_segments is not None:
            visible = visible & (self.q_segments[:, rows, None] == self.k_segments[:, None, :])
        return visible


class _ClosedForm(TokenPositions):
    """Positions that are runs of integers. Kernels read the integers alone; each tensor would cost them a launch."""

    _q_len: int
    _kv_len: int
    _device: torch.device | str | None

    def __init__(self, q_len: int, kv_len: int, offset: int, k_offset: int, device: torch.device | str | None) -> None:
        values = {"_q_len": q_len, "_kv_len": kv_len, "offset": offset, "k_offset": k_offset, "_device": device}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def q_positions(self) -> Tensor:
        assert self.offset is not None
        return torch.arange(self.offset, self.offset + self._q_len, device=self._device)[None]

    @cached_property
    def k_positions(self) -> Tensor:
        return torch.arange(self.k_offset, self.k_offset + self._kv_len, device=self._device)[None]

    @property
    def q_len(self) -> int:
        return self._q_len

    @property
    def kv_len(self) -> int:
        return self._kv_len

    @property
    def batches(self) -> tuple[int, int]:
        return 1, 1
