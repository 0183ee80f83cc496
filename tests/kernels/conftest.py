"""Attention from the definitions, in float64: what every backend is judged by."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, TokenPositions

Naive = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small cost threads more in waiting for each other than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
