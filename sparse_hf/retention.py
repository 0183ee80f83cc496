"""What a KV cache must keep of each head, and how its storage does that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sparse_hf_kernels import UNBOUNDED, AttentionLayout, HeadPattern
from sparse_hf_kernels.kv_cache import HeadStorage, StorageLayout


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which keys a group of heads must keep: sinks and the last `recent`, or all when `recent` is None."""

    recent: int | None = None
    num_sink_tokens: int = 0

    @property
    def capacity(self) -> int:
        return UNBOUNDED if self.recent is None else self.recent + self.num_sink_tokens

    def kept_tokens(self, seq_len: int, num_dense_rows: int = 0) -> int:
        """Keys held per head after `seq_len` tokens; while a dense row may come, all of them."""
        return seq_len if seq_len < num_dense_rows else min(seq_len, self.capacity)


def retention_groups(layout: AttentionLayout, per_head: bool = True) -> list[tuple[Retention, tuple[int, ...]]]:
    """The layout's KV heads, grouped by what their cache must keep; `per_head=False` keeps everything for all."""
    groups: dict[Retention, list[int]] = {}
    for pattern, heads in layout.groups:
        groups.setdefault(_retention(pattern, layout, per_head), []).extend(heads)
    return [(retention, tuple(sorted(heads))) for retention, heads in groups.items()]


def _retention(pattern: HeadPattern, layout: AttentionLayout, per_head: bool) -> Retention:
    window = min(_reach(pattern), layout.max_distance)
    if not per_head or window == UNBOUNDED:
        return Retention()
    # The next query reads itself and window - 1 earlier keys.
    retention = Retention(recent=window - 1, num_sink_tokens=pattern.num_sink_tokens)
    if retention.capacity >= layout.max_distance - 1:
        # The model's own window holds no more than that, and sinks before it are out of reach.
        return Retention(recent=layout.max_distance - 1)
    return retention


def _reach(pattern: HeadPattern) -> int:
    """Keys at this distance or more are not read, sinks apart."""
    if pattern.num_last_tokens:
        return UNBOUNDED  # the next query is a last row
    if pattern.blocks is not None:
        return pattern.blocks.reach or UNBOUNDED
    return pattern.window


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """How one layer is cached.

    Args:
        storage: how its heads keep their keys.
        first: the same with every key kept, before `parts_at`; None where `storage` keeps every key.
        parts_at: tokens from which on some head may free keys: it is full, and no later query is a dense row.
        decodes: the fused decode step reads what the layout says; it knows no block rules, and of a ring all.
        parts: per group of `storage`, the layout of its heads.
    """

    storage: StorageLayout
    first: StorageLayout | None
    parts_at: int
    decodes: bool
    parts: tuple[AttentionLayout, ...]


_ATTRIBUTE = "_cache_plans"


def cache_plan(layout: AttentionLayout, per_head: bool = True) -> CachePlan:
    """The plan of a layer; `per_head=False` keeps every key for all heads.

    It stays on the layout: every new cache asks for those of all layers, and to look them up by value takes longer than
    the rest of making it.
    """
    plans: dict[bool, CachePlan] = layout.__dict__.setdefault(_ATTRIBUTE, {})
    if per_head not in plans:
        plans[per_head] = _cache_plan(layout, per_head)
    return plans[per_head]


@lru_cache(maxsize=1024)
def _cache_plan(layout: AttentionLayout, per_head: bool) -> CachePlan:
    kept = [_retention(pattern, layout, per_head) for pattern in layout.patterns]
    heads = tuple(map(_stored, layout.patterns, kept))
    storage = StorageLayout(heads=heads, num_dense_rows=layout.num_dense_rows, max_distance=layout.max_distance)
    first, capacities = None, [retention.capacity for retention in kept if retention.recent is not None]
    if capacities:
        first = replace(storage, heads=tuple(_stored(pattern, Retention()) for pattern in layout.patterns))
    whole = all(_is_read_whole(*pair, layout.max_distance) for pair in zip(layout.patterns, kept, strict=True))
    return CachePlan(
        storage=storage,
        first=first,
        parts_at=max(layout.num_dense_rows, min(capacities, default=0)),
        decodes=layout.causal and whole,
        parts=tuple(layout.select(group.heads) for group in storage.groups),
    )


def _stored(pattern: HeadPattern, retention: Retention) -> HeadStorage:
    if retention.recent is not None:
        return HeadStorage(recent=retention.recent, num_sink_tokens=retention.num_sink_tokens)
    # Last rows and selected patterns read every key in a decode step.
    if pattern.num_last_tokens or pattern.window == UNBOUNDED:
        return HeadStorage()
    return HeadStorage(window=pattern.window, num_sink_tokens=pattern.num_sink_tokens)


def _is_read_whole(pattern: HeadPattern, retention: Retention, max_distance: int) -> bool:
    """A query reads all that is kept, or what the pattern's window and sinks say of all keys."""
    if pattern.blocks is not None:
        return False
    if retention.recent is None:
        return True
    window = min(pattern.window, max_distance)
    return retention == Retention(recent=window - 1, num_sink_tokens=pattern.num_sink_tokens)
