"""What the heads of a cache layer attend to when tokens come after others: stored keys and new ones, and positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_hf_kernels import UNBOUNDED, AttentionLayout, TokenPositions
from sparse_hf_kernels.kv_cache import KVStorage, StorageGroup, slot_positions


@lru_cache(maxsize=1024)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads on the device, one tensor for all layers and caches: each copy there would be waited for."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedGroup:
    """What some KV heads of a layer attend to.

    Args:
        heads: their numbers; `index` holds them on the device.
        layout: of these heads, for queries and keys at `positions`.
        keys, values: `[batch, heads, kv_len, head_dim]`, earlier tokens and new ones.
    """

    heads: tuple[int, ...]
    index: Tensor
    layout: AttentionLayout
    keys: Tensor
    values: Tensor
    positions: TokenPositions


def ring_group(
    storage: KVStorage,
    group: StorageGroup,
    layout: AttentionLayout,
    keys: Tensor,
    values: Tensor,
    seen: int,
    new: Tensor | None,
    by_position: bool,
) -> CachedGroup:
    """Of heads that keep sinks and recent tokens, before the new ones push some out.

    Args:
        keys, values: of the new tokens and all heads, `[batch, num_kv_heads, new, head_dim]`.
        seen: slots that came before.
        new: positions `[batch, new]`; None where all rows have `seen` tokens and nothing is padded.
        by_position: positions are true ones.
    """
    old_keys, old_values, positions = _ring_kept(storage, group, layout, seen, new, keys.shape[2], by_position)
    index = head_index(group.heads, keys.device)
    if len(group.heads) < keys.shape[1]:
        keys, values = keys.index_select(1, index), values.index_select(1, index)
    return CachedGroup(
        heads=group.heads,
        index=index,
        # Heads part once no later query is a dense row.
        layout=layout.without_dense_rows,
        keys=torch.cat([*old_keys, keys], 2),
        values=torch.cat([*old_values, values], 2),
        positions=positions,
    )


def _ring_kept(
    storage: KVStorage,
    group: StorageGroup,
    layout: AttentionLayout,
    seen: int,
    new: Tensor | None,
    num_new: int,
    by_position: bool,
) -> tuple[list[Tensor], list[Tensor], TokenPositions]:
    """Keys and values of a ring before new tokens push some out, and positions with those."""
    assert group.ring is not None
    recent, sinks = group.ring
    device = storage.keys.device
    kept = min(seen, recent + sinks)
    if new is not None:
        old = slot_positions(group.ring, kept, storage.lengths)
        positions = TokenPositions(q_positions=new, k_positions=torch.cat([old, new], 1))
        return *storage.read(group, (0, kept)), positions
    if kept == seen or not sinks:
        positions = TokenPositions.causal(num_new, kept + num_new, device, q_offset=seen, k_offset=seen - kept)
    elif by_position or layout.max_distance < UNBOUNDED:
        behind = torch.arange(seen - recent, seen + num_new, device=device)
        k_positions = torch.cat([torch.arange(sinks, device=device), behind])
        positions = TokenPositions(q_positions=behind[None, recent:], k_positions=k_positions[None])
    else:
        # Sinks are read from any distance and still stand before `num_sink_tokens`: the gap behind them is nothing
        # to a pattern, and without it the positions are a run.
        positions = TokenPositions.causal(num_new, kept + num_new, device)
    oldest = sinks + (seen - sinks) % max(recent, 1)
    turned = seen > recent + sinks and oldest > sinks
    spans = [(0, sinks), (oldest, kept), (sinks, oldest)] if turned else [(0, kept)]
    return *storage.read(group, *spans), positions


def linear_group(
    storage: KVStorage, group: StorageGroup, layout: AttentionLayout, seen: int, end: int, new: Tensor | None
) -> CachedGroup:
    """Of heads that keep every key, once the new ones are stored in slots up to `end`."""
    (keys,), (values,) = storage.read(group, (0, end))
    if new is None:
        positions = TokenPositions.causal(end - seen, end, keys.device, q_offset=seen)
    else:
        stored = slot_positions(None, end, storage.lengths)
        positions = TokenPositions(q_positions=new, k_positions=stored)
    index = head_index(group.heads, keys.device)
    return CachedGroup(heads=group.heads, index=index, layout=layout, keys=keys, values=values, positions=positions)
