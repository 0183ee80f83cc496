"""Storing tokens and decoding in plain torch: what the kernels are judged by, and what runs where they do not."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.kv_cache.layout import StorageGroup, StorageLayout, slot_positions
from sparse_hf_kernels.kv_cache.storage import KVStorage, quantize


def store_naive(storage: KVStorage, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor) -> None:
    """See `store_tokens`; `positions [batch, new]`, `lengths [batch]` tokens of each row with the new ones."""
    for group in storage.layout.groups:
        slots, keep = _slots(group, positions, lengths)
        rows, tokens = keep.nonzero(as_tuple=True)
        where = slots[rows, tokens]
        heads = list(group.heads)
        for new, x, scales in ((k, storage.keys, storage.k_scales), (v, storage.values, storage.v_scales)):
            taken = new[:, heads].transpose(1, 2)[rows, tokens]
            if storage.kv_dtype is None:
                storage.view(x, group).transpose(1, 2)[rows, where] = taken
                continue
            stored, scale = quantize(taken, storage.kv_dtype)
            # Indexed assignment knows no 8-bit floats.
            storage.view(x, group).view(torch.int8).transpose(1, 2)[rows, where] = stored.view(torch.int8)
            storage.view(scales, group).transpose(1, 2)[rows, where] = scale


def _slots(group: StorageGroup, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where new tokens go, `[batch, new]`, and which of them stay once all are stored."""
    keep = positions >= 0
    if group.ring is None:
        return positions, keep
    recent, sinks = group.ring
    slots = torch.where(positions < sinks, positions, sinks + (positions - sinks).remainder(max(recent, 1)))
    return slots, keep & ((positions < sinks) | (positions >= lengths[:, None] - recent))


def readable(layout: StorageLayout, head: int, positions: Tensor, lengths: Tensor) -> Tensor:
    """Boolean like `positions [batch, slots]`: stored tokens that the query at `lengths [batch]` reads."""
    stored, query = layout.heads[head], lengths.to(torch.int64)[:, None]
    if stored.recent is None:
        keep = (query - positions < stored.window) | (positions < stored.num_sink_tokens)
        keep = keep | (query < layout.num_dense_rows)
    else:
        # A ring of `recent` tokens is what the next query's window holds besides itself.
        keep = torch.ones_like(positions, dtype=torch.bool)
    return keep & (positions >= 0) & (query - positions < layout.max_distance)


def decode_naive(
    q: Tensor, k: Tensor, v: Tensor, storage: KVStorage, *, scale: float, valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `decode_attention`; computes in `dtype`. Stores the new token and counts it."""
    layout, lengths = storage.layout, storage.lengths.to(torch.int64)
    batch, num_heads, _, _ = q.shape
    group_size = num_heads // len(layout.heads)
    valid = torch.ones(batch, dtype=torch.bool, device=q.device) if valid is None else valid.bool()
    out = q.new_zeros(batch, num_heads, 1, v.shape[3])
    for group in layout.groups:
        end = group.slots(storage.capacity)
        (keys,), (values,) = storage.read(group, (0, end))
        positions = slot_positions(group.ring, end, lengths)
        for index, head in enumerate(group.heads):
            keep = readable(layout, head, positions, lengths)
            keep = torch.cat([keep, valid[:, None]], 1)[:, None]
            new_k, new_v = (torch.cat([x[:, index], new[:, head]], 1) for x, new in ((keys, k), (values, v)))
            rows = slice(head * group_size, (head + 1) * group_size)
            scores = q[:, rows, 0].to(dtype) @ new_k.to(dtype).transpose(1, 2) * scale
            weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
            # Slots that hold nothing may hold anything, even NaN.
            clean = new_v.to(dtype).masked_fill(~keep.transpose(1, 2), 0)
            found = torch.where(keep, weights, 0) @ clean
            out[:, rows, 0] = found.masked_fill(~valid[:, None, None], 0).to(out.dtype)
    new_positions = torch.where(valid, lengths, -1)[:, None]
    store_naive(storage, k, v, new_positions, lengths + valid)
    storage.state[0] += 1
    storage.state[1:] += valid.to(torch.int32)
    return out
