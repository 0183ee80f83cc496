"""Attention from the definitions, in float64: what every backend is judged by."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, TokenPositions
from sparse_hf_kernels.kv_cache import KVDtype, StorageLayout

Naive = Callable[..., tuple[Tensor, Tensor]]


def naive_mask(layout: AttentionLayout, positions: TokenPositions) -> Tensor:
    """Which keys each KV head's queries read: boolean `[batch or 1, num_kv_heads, q_len, kv_len]`."""
    i, j = positions.q_positions[:, :, None], positions.k_positions[:, None, :]
    heads = []
    for pattern in layout.patterns:
        if pattern.blocks is None:
            keep = ((i - j).abs() < pattern.window) | (j < pattern.num_sink_tokens)
            if pattern.num_last_tokens:
                own = (positions.k_positions >= 0)[:, None, :].expand(-1, i.shape[1], -1)
                if positions.q_segments is not None:
                    own = own & (positions.q_segments[:, :, None] == positions.k_segments[:, None, :])
                end = torch.where(own, j + 1, 0).amax(-1, keepdim=True)  # the length of each query's sequence
                keep = keep | (i >= end - pattern.num_last_tokens)
        else:
            blocks = pattern.blocks
            pairs = {
                (row, column)
                for row in range(blocks.num_rows)
                for column in blocks.indices[blocks.row_ptr[row] : blocks.row_ptr[row + 1]]
            }
            table = torch.zeros(blocks.num_rows, blocks.num_rows, dtype=torch.bool)
            for row, column in pairs:
                table[row, column] = True
            # Empty slots (position -1) read and are read by nobody: any table entry will do.
            keep = table[i.clamp_min(0) // blocks.block_size, j.clamp_min(0) // blocks.block_size]
        keep = (keep | (i < layout.num_dense_rows)) & ((i - j).abs() < layout.max_distance)
        keep = keep & (j >= 0) & (i >= 0)
        if layout.causal:
            keep = keep & (j <= i)
        if positions.q_segments is not None:
            keep = keep & (positions.q_segments[:, :, None] == positions.k_segments[:, None, :])
        heads.append(keep)
    return torch.stack(heads, 1)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by one softmax over a dense mask, in `dtype`."""
    group = q.shape[1] // k.shape[1]
    allowed = naive_mask(layout, positions).repeat_interleave(group, 1)
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    some = allowed.any(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed & some, float("-inf"))
    out = torch.where(some, scores.softmax(-1) @ v, 0.0)
    lse = torch.where(some[..., 0], scores.logsumexp(-1), float("-inf"))
    return out, lse


@pytest.fixture(scope="session")
def naive() -> Naive:
    return naive_attention


@pytest.fixture(scope="session", name="naive_mask")
def naive_mask_fixture() -> Callable[[AttentionLayout, TokenPositions], Tensor]:
    return naive_mask


class KVHistory:
    """Every token of each row as it came, and what a new one reads of them by the words of `HeadStorage`.

    Args:
        kv_dtype: what is kept went through 8 bits and back; a new token reads itself as it is.
    """

    def __init__(self, layout: StorageLayout, batch: int, kv_dtype: KVDtype | None = None) -> None:
        self.layout, self.kv_dtype = layout, kv_dtype
        self.tokens: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]

    def add(self, k: Tensor, v: Tensor, real: Tensor) -> None:
        """k, v `[batch, num_kv_heads, new, head_dim]`; `real [batch, new]` is False for padding."""
        for row, mask in enumerate(real):
            self.tokens[row].append((self._kept(k[row, :, mask]), self._kept(v[row, :, mask])))

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_kv_heads, length, head_dim]`; merged, so that asking again costs nothing."""
        keys, values = (torch.cat(x, 1) for x in zip(*self.tokens[row], strict=True))
        self.tokens[row] = [(keys, values)]
        return keys, values

    def lengths(self) -> list[int]:
        return [sum(keys.shape[1] for keys, _ in tokens) for tokens in self.tokens]

    def reads(self, head: int, position: int, device: torch.device) -> Tensor:
        """Boolean `[position + 1]`: the positions that the query at `position` reads."""
        stored, j = self.layout.heads[head], torch.arange(position + 1, device=device)
        distance = position - j
        if stored.recent is None:
            keep = (distance < stored.window) | (j < stored.num_sink_tokens) | (position < self.layout.num_dense_rows)
        else:
            keep = (distance <= stored.recent) | (j < stored.num_sink_tokens)
        return keep & (distance < self.layout.max_distance)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Output `[batch, 1, num_heads, head_dim]` of new tokens `[batch, heads, 1, head_dim]`, computed in `dtype`."""
        batch, num_heads, _, _ = q.shape
        group = num_heads // k.shape[1]
        out = torch.zeros(batch, 1, num_heads, v.shape[3], dtype=dtype, device=q.device)
        for row in valid.nonzero()[:, 0].tolist():
            keys, values = self.row(row)
            for head in range(k.shape[1]):
                keep = self.reads(head, keys.shape[1], q.device)
                seen_k, seen_v = (
                    torch.cat([old[head], new[row, head].to(old.dtype)])[keep].to(dtype)
                    for old, new in ((keys, k), (values, v))
                )
                heads = slice(head * group, (head + 1) * group)
                scores = q[row, heads, 0].to(dtype) @ seen_k.T * scale
                out[row, 0, heads] = scores.softmax(-1) @ seen_v
        return out

    def _kept(self, x: Tensor) -> Tensor:
        if self.kv_dtype is None:
            return x
        largest = 127 if self.kv_dtype == "int8" else 448
        scale = (x.float().abs().amax(-1, keepdim=True) / largest).clamp_min(2.0**-126)
        scaled = x.float() / scale
        return (scaled.round() if self.kv_dtype == "int8" else scaled.to(torch.float8_e4m3fn).float()) * scale


@pytest.fixture(scope="session")
def kv_history() -> type[KVHistory]:
    return KVHistory


@pytest.fixture
def new_tokens() -> Callable[..., list[Tensor]]:
    """`new_tokens(batch, kv_heads, length, dim, dtype, group=0, device="cpu")`: k and v, and q before them where there
    is a group of query heads per KV head, with a projection's strides."""

    def make(
        batch: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype, group: int = 0, device: str = "cpu"
    ) -> list[Tensor]:
        heads = [kv_heads * group] * (group > 0) + [kv_heads] * 2
        return [torch.randn(batch, length, n, dim, device=device).to(dtype).transpose(1, 2) for n in heads]

    return make
