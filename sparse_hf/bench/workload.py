"""What is computed: shapes, inputs, patterns, and the work that a pattern leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sparse_hf.call_counts import selected_counts
from sparse_hf_kernels import AttentionLayout, BlockList, BlockSelection, HeadPattern

Direction = Literal["forward", "backward", "both"]

WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Products of each direction over the two of a forward."""

BLOCK_SIZE = 128
NUM_SINK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One sequence of causal self-attention."""

    seq_len: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.seq_len, self.num_heads, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(f"lengths, heads and head_dim must be positive, got {self}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot be shared out over {self.num_kv_heads} KV heads")

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    def with_kv_heads(self, num_kv_heads: int) -> Shape:
        """Fewer KV heads with as many query heads each."""
        return replace(self, num_heads=num_kv_heads * self.group_size, num_kv_heads=num_kv_heads)


def make_inputs(shape: Shape, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q `[1, num_heads, seq_len, head_dim]` and k, v `[1, num_kv_heads, seq_len, head_dim]`; leaves."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        size = (1, heads, shape.seq_len, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=shape.dtype).requires_grad_()

    return draw(shape.num_heads), draw(shape.num_kv_heads), draw(shape.num_kv_heads)


def streaming(window: int, num_sink_tokens: int = NUM_SINK_TOKENS) -> HeadPattern:
    return HeadPattern(window=window, num_sink_tokens=num_sink_tokens)


def uniform(pattern: HeadPattern, num_kv_heads: int) -> AttentionLayout:
    return AttentionLayout(patterns=(pattern,) * num_kv_heads)


@lru_cache(maxsize=16)
def random_blocks(num_kv_heads: int, seq_len: int, keep: float, seed: int = 0) -> AttentionLayout:
    """Each KV head has its own random 128-blocks: the diagonal, and others so that a row keeps about `keep` of its own.

    A row of n causal blocks keeps `max(1, round(keep * n))`.
    """
    num_rows = -(-seq_len // BLOCK_SIZE)
    kept = (torch.arange(1, num_rows + 1) * keep).round().clamp_min(1)
    generator = torch.Generator().manual_seed(seed)
    patterns = []
    for _ in range(num_kv_heads):
        scores = torch.rand(num_rows, num_rows, generator=generator).tril(-1)
        scores.fill_diagonal_(2)
        rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
        mask = (rank < kept[:, None]).tril()
        patterns.append(HeadPattern(blocks=BlockList.from_mask(mask, BLOCK_SIZE)))
    return AttentionLayout(patterns=tuple(patterns))


def kept_pairs(layout: AttentionLayout, seq_len: int) -> int:
    """Exact number of (query, key) pairs that the layout keeps, over its KV heads (not times the group size)."""
    return sum(len(heads) * int(layout.row_counts(pattern, seq_len).sum()) for pattern, heads in layout.groups)


def density(layout: AttentionLayout, seq_len: int) -> float:
    """Kept pairs over those of dense causal attention."""
    return kept_pairs(layout, seq_len) / (layout.num_kv_heads * seq_len * (seq_len + 1) // 2)


def selected_density(selection: BlockSelection, seq_len: int) -> float:
    """Pairs that a selection of a whole sequence keeps over those of dense causal attention, all heads together."""
    batch, num_heads, _ = selection.counts.shape
    pairs = int(selected_counts(selection, 0, seq_len)[0].sum())
    return pairs / (batch * num_heads * seq_len * (seq_len + 1) // 2)


def useful_flops(shape: Shape, layout: AttentionLayout, direction: Direction) -> float:
    """FLOPs of the kept pairs alone: two products of 2 * head_dim each forward, 2.5 times that backward."""
    return WORK[direction] * 4 * shape.head_dim * shape.group_size * kept_pairs(layout, shape.seq_len)
