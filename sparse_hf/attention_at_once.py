"""Short calls of layers that are dense at their length, where PyTorch's own attention computes those.

They take less time on the device than on the host, and a stock model does nothing but call SDPA. What other calls ask
in every layer is asked once per forward pass here.

While a cache holds fewer tokens than the dense rows of its layer, every head keeps every key. Such a layer stores them
in one `WholeGroup`, as a stock cache does; `split_groups` gives the groups of heads what is theirs once they part.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.cache import HeadGroup, PendingKV, Retention, SparseCacheLayer, head_index
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import LayerState
from sparse_hf_kernels import AttentionLayout
from sparse_hf_kernels.sparse_attention.sdpa import takes_at_once


class WholeGroup(HeadGroup):
    """All KV heads of a layer while they keep the same keys, of unpadded sequences."""


def check_length(plan: ForwardPlan, state: LayerState) -> None:
    """Raises ValueError for a longer sequence than the model was made for."""
    seen = plan.q_len + (plan.q_offset if isinstance(plan.q_offset, int) else 0)
    if seen > state.max_position:
        raise ValueError(
            f"the sequence has {seen} tokens, the model was made for {state.max_position} "
            "(config.max_position_embeddings); shorten it, or configure rope scaling and the limit"
        )


def attend_at_once(
    state: LayerState,
    query: Tensor,
    key: Tensor | PendingKV,
    value: Tensor | PendingKV,
    plan: ForwardPlan | Tensor | None,
    position_ids: Tensor | None,
    scale: float,
) -> Tensor | None:
    """Output `[batch, num_heads, q_len, head_dim]` of such a call; None for any other.

    Whole sequences without padding and packing, and single tokens after them. Arguments as in
    `sparse_attention_forward`.
    """
    layout, shape = state.layout, query.shape
    pending = key if isinstance(key, PendingKV) else None
    seen = 0 if pending is None else pending.layer.num_tokens
    num_dense = min(layout.num_dense_rows, layout.max_distance)
    if seen + shape[2] > max(layout.dense_len, num_dense) or (seen and (shape[2] > 1 or seen + 1 >= num_dense)):
        return None
    if state.gate is not None or state.recorders or not isinstance(plan, ForwardPlan):
        return None
    if pending is not None:
        if pending.layer.layout != layout or (seen and not isinstance(pending.layer.groups[0], WholeGroup)):
            return None
        key, value = pending.keys, pending.values
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    known = plan.known
    if known.get("at_once_shape") != shape:
        check_length(plan, state)
        known["at_once"] = _are_at_once(query, key, value, seen, plan, position_ids)
        known["at_once_shape"] = shape
    if not known["at_once"] or not query.dtype == key.dtype == value.dtype:
        return None
    grouped = shape[1] != layout.num_kv_heads
    if pending is None or seen + shape[2] >= num_dense:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        if pending is not None:
            pending.store(plan, position_ids)
            pending.release()
        return out
    whole = _store_whole(pending, plan)
    causal = shape[2] > 1
    return F.scaled_dot_product_attention(
        query, whole.keys, whole.values, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _are_at_once(
    query: Tensor, key: Tensor, value: Tensor, seen: int, plan: ForwardPlan, position_ids: Tensor | None
) -> bool:
    """Whether SDPA serves the dense calls of this forward pass; `seen` tokens of a cache came before it."""
    lengths = plan.q_len, plan.kv_len, plan.q_offset, plan.kv_offset
    if isinstance(plan.q_offset, Tensor) or lengths != (query.shape[2], seen + query.shape[2], seen, 0):
        return False
    # Under autocast dtypes differ, and without a dense last dimension SDPA would form the N x N scores.
    if torch.is_autocast_enabled(query.device.type) or any(x.stride(-1) != 1 for x in (query, key, value)):
        return False
    fixed_order = torch.are_deterministic_algorithms_enabled()
    layout = _dense_layout(key.shape[1])
    return takes_at_once(query, key, value, layout, None, None, fixed_order) and plan.is_plain(position_ids)


@lru_cache
def _dense_layout(num_kv_heads: int) -> AttentionLayout:
    return AttentionLayout.dense(num_kv_heads)


def _store_whole(pending: PendingKV, plan: ForwardPlan) -> WholeGroup:
    """Appends the new tokens of an unpadded batch; what only positions say is the same in all layers."""
    layer, known = pending.layer, plan.known
    batch, num_heads, q_len, _ = pending.keys.shape
    assert layer.lengths is not None
    group = layer.groups[0]
    if not isinstance(group, WholeGroup):
        if "all_heads" not in known:
            known["all_heads"] = torch.arange(num_heads, device=pending.keys.device)
        empty = group.positions[:, :0]
        heads, index = tuple(range(num_heads)), known["all_heads"]
        keys, values = pending.keys[:, :, :0], pending.values[:, :, :0]
        group = WholeGroup(retention=Retention(), heads=heads, index=index, keys=keys, values=values, positions=empty)
        layer.groups = [group]
    if "stored_positions" not in known:
        new = torch.arange(layer.num_tokens, layer.num_tokens + q_len, device=pending.keys.device)
        known["stored_positions"] = torch.cat([group.positions, new.expand(batch, -1)], 1)
        known["stored_lengths"] = layer.lengths + q_len
    group.keys = torch.cat([group.keys, pending.keys], 2)
    group.values = torch.cat([group.values, pending.values], 2)
    group.positions, layer.lengths = known["stored_positions"], known["stored_lengths"]
    layer.num_tokens += q_len
    return group


def split_groups(layer: SparseCacheLayer) -> None:
    """Gives a layer that stores all heads together the groups that its heads will part into."""
    if not layer.groups or not isinstance(whole := layer.groups[0], WholeGroup):
        return
    device = whole.keys.device
    layer.groups = []
    for retention, heads in layer.retentions:
        index = head_index(heads, device)
        alone = len(heads) == whole.keys.shape[1]
        group = HeadGroup(
            retention=retention,
            heads=heads,
            index=index,
            keys=whole.keys if alone else whole.keys.index_select(1, index),
            values=whole.values if alone else whole.values.index_select(1, index),
            positions=whole.positions,
        )
        layer.groups.append(group)
