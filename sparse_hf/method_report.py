"""What a static method does in one layer at a length: exact counts, memory and arithmetic, from shapes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_hf.methods import HeadPlace, Method
from sparse_hf.retention import retention_groups
from sparse_hf_kernels import AttentionLayout, HeadPattern
from sparse_hf_kernels.counts import keys_below

INT32_BYTES = 4
FLOPS_PER_PAIR = 4
"""Times head_dim: a multiplication and an addition for the score, and as many for the output."""


@dataclass(frozen=True, kw_only=True)
class HeadReport:
    """KV heads that share a pattern.

    Args:
        kv_heads: their numbers.
        stored_entries: kept (query, key) pairs of one such head.
        density: of the causal pairs.
        mask_bytes: the pattern as compact block lists (int32 row offsets and block numbers); 0 for closed forms.
        kept_tokens: tokens whose keys and values its cache holds.
    """

    kv_heads: tuple[int, ...]
    stored_entries: int
    density: float
    mask_bytes: int
    kept_tokens: int


@dataclass(frozen=True, kw_only=True)
class MethodReport:
    """One layer whose heads all follow a method, for one sequence; bytes and floating-point operations of the layer.

    Args:
        method: with its parameters.
        seq_len, layer, num_heads, num_kv_heads, head_dim: what it was counted for.
        heads: each distinct pattern.
        stored_entries, causal_entries: kept and causal pairs over the KV heads.
        mask_bytes: of all distinct patterns.
        dense_mask_bytes: of one boolean mask `[seq_len, seq_len]` per distinct pattern.
        kv_bytes, dense_kv_bytes: of a per-head cache after the sequence, and with every key kept.
        flops, dense_flops: of the forward products of scores and outputs over the query heads.
    """

    method: dict[str, Any]
    seq_len: int
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    heads: tuple[HeadReport, ...]
    stored_entries: int
    causal_entries: int
    mask_bytes: int
    dense_mask_bytes: int
    kv_bytes: int
    dense_kv_bytes: int
    flops: int
    dense_flops: int

    @property
    def density(self) -> float:
        return self.stored_entries / self.causal_entries

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "density": self.density}


def method_layout(method: Method, num_kv_heads: int, layer: int = 0) -> AttentionLayout:
    """A layer all of whose KV heads follow the method.

    Raises:
        ValueError: for a dynamic method.
    """
    if not method.is_static:
        raise ValueError(
            f"{method.name} is dynamic: what it reads depends on q and k; only static methods can be counted and drawn "
            "from shapes"
        )
    places = (HeadPlace(layer=layer, kv_head=head, num_kv_heads=num_kv_heads) for head in range(num_kv_heads))
    return AttentionLayout(patterns=tuple(method.pattern(place) for place in places))


def report_method(
    method: Method,
    seq_len: int,
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    layer: int = 0,
    bytes_per_element: int = 2,
) -> MethodReport:
    """Exact figures of a static method. The default shape is that of Llama 3.1 8B.

    Args:
        method: of all heads.
        seq_len: tokens of the sequence.
        num_heads, num_kv_heads, head_dim: the layer's shape.
        layer: its number, which some patterns depend on.
        bytes_per_element: of the cache.

    Raises:
        ValueError: for a dynamic method, or a shape or length that is not positive or beyond an explicit pattern.
    """
    if min(seq_len, num_heads, num_kv_heads, head_dim) <= 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"seq_len, heads and head_dim must be positive and num_kv_heads divide num_heads, "
            f"got {seq_len}, {num_heads}, {num_kv_heads} and {head_dim}"
        )
    layout = method_layout(method, num_kv_heads, layer)
    causal = seq_len * (seq_len + 1) // 2
    kept = {head: r.kept_tokens(seq_len) for r, members in retention_groups(layout) for head in members}
    heads = []
    for pattern, members in layout.groups:
        entries = int(layout.row_counts(pattern, seq_len).sum())
        report = HeadReport(
            kv_heads=members,
            stored_entries=entries,
            density=entries / causal,
            mask_bytes=_list_bytes(pattern, seq_len),
            kept_tokens=kept[members[0]],
        )
        heads.append(report)
    entries = sum(head.stored_entries * len(head.kv_heads) for head in heads)
    per_token, per_entry = 2 * head_dim * bytes_per_element, FLOPS_PER_PAIR * head_dim * (num_heads // num_kv_heads)
    return MethodReport(
        method=method.to_dict(),
        seq_len=seq_len,
        layer=layer,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        heads=tuple(heads),
        stored_entries=entries,
        causal_entries=causal * num_kv_heads,
        mask_bytes=sum(head.mask_bytes for head in heads),
        dense_mask_bytes=len(heads) * seq_len**2,
        kv_bytes=sum(kept.values()) * per_token,
        dense_kv_bytes=num_kv_heads * seq_len * per_token,
        flops=entries * per_entry,
        dense_flops=causal * num_kv_heads * per_entry,
    )


def density_map(layout: AttentionLayout, pattern: HeadPattern, seq_len: int, num_cells: int = 256) -> Tensor:
    """Share of kept pairs in a grid over queries and keys, float32 `[cells, cells]`; some rows stand for each cell.

    Raises:
        ValueError: if the sequence is beyond an explicit pattern.
    """
    cells = min(num_cells, seq_len)
    borders = torch.arange(cells + 1) * seq_len // cells
    shares = []
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        rows = torch.arange(begin, end, max(1, (end - begin) // 16))
        shares.append(keys_below(layout, pattern, seq_len, rows, borders).diff(dim=1).double().mean(0))
    return (torch.stack(shares) / borders.diff()).float()


def _list_bytes(pattern: HeadPattern, seq_len: int) -> int:
    """Of int32 row offsets and block numbers."""
    rule = pattern.blocks
    if rule is None:
        return 0
    num_blocks = -(-seq_len // rule.block_size)
    columns = torch.arange(num_blocks)
    listed = sum(
        int((rule.keeps(rows[:, None], columns) & (columns <= rows[:, None])).sum()) for rows in columns.split(512)
    )
    return INT32_BYTES * (listed + num_blocks + 1)
