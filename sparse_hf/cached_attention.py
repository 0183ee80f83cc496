"""Attention over a `SparseCache`: the first tokens, chunks after others, and single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_hf.attend import attend, branch_records
from sparse_hf.attention_at_once import attend_at_once, check_length
from sparse_hf.cache_layer import PendingKV
from sparse_hf.dynamic import LayerHeads, dynamic_attention
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import LayerState
from sparse_hf_kernels import sparse_attention

if TYPE_CHECKING:
    from sparse_hf.call_record import CallRecord


def decode_at_once(
    state: LayerState, query: Tensor, pending: PendingKV, plan: ForwardPlan | Tensor | None, scale: float
) -> Tensor | None:
    """Output `[batch, 1, num_heads, head_dim]` of one new token a row by the fused decode step; None for other calls.

    A step that a stock model makes in a few launches: what is asked here is asked in every layer for every token.
    """
    layer = pending.layer
    if state.recorders or state.gate is not None or state.exchange is not None or not layer.fits(state.layout):
        return None
    if not isinstance(plan, ForwardPlan) or not layer.decodes(query, plan):
        return None
    layer.check_step(plan)
    if layer.max_length is None:
        check_length(plan, state)
    if not torch.is_grad_enabled():
        return layer.decode(query, pending.keys, pending.values, plan, scale)
    with torch.no_grad():
        out = layer.decode(query, pending.keys, pending.values, plan, scale)
    return _without_gradient(out, query)


def first_at_once(
    state: LayerState,
    query: Tensor,
    pending: PendingKV,
    plan: ForwardPlan | Tensor | None,
    position_ids: Tensor | None,
    scale: float,
) -> Tensor | None:
    """Output `[batch, num_heads, q_len, head_dim]` of a growing cache's first tokens by `attend_at_once`, which are
    stored; None for other calls. Like `decode_at_once` it asks little: the stock model takes no longer on the host."""
    layer, keys, values = pending.layer, pending.keys, pending.values
    if layer.storage is not None or torch.is_grad_enabled() or not layer.fits(state.layout):
        return None
    out = attend_at_once(state, query, keys, values, plan, position_ids, scale)
    if out is not None:
        assert isinstance(plan, ForwardPlan)
        if not layer.store_at_once(keys, values, plan):
            layer.store(keys, values, plan, position_ids)
    return out


def attend_cached(
    state: LayerState,
    query: Tensor,
    pending: PendingKV,
    plan: ForwardPlan,
    position_ids: Tensor | None,
    scale: float,
    records: Sequence[CallRecord],
) -> Tensor:
    """Output `[batch, num_heads, q_len, head_dim]`; the new tokens are stored.

    Raises:
        ValueError: while gates train, or if the cache was made for other head masks or is not whole.
    """
    layer, keys, values = pending.layer, pending.keys, pending.values
    if state.current_gate() is not None:
        raise ValueError("a SparseCache serves deployed masks; call model.eval() before generating while gates train")
    if not layer.fits(state.layout):
        raise ValueError("this SparseCache was made for other head masks or another model; make a new one")
    layer.check_step(plan)
    if layer.num_tokens == 0 and not records:
        # Nothing was evicted: the new keys are all that there are, and one call serves all heads.
        out = attend_at_once(state, query, keys, values, plan, position_ids, scale)
        if out is None:
            check_length(plan, state)
            out = attend(state, query, keys, values, plan, position_ids, scale, ())
        with torch.no_grad():
            layer.store(keys, values, plan, position_ids)
        return out
    check_length(plan, state)
    with torch.no_grad():
        out = _attend_groups(state, query, pending, plan, position_ids, scale, records)
    return _without_gradient(out, query)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise ValueError(
            "a SparseCache holds keys and values without their gradients; pass use_cache=False or a DynamicCache where "
            "gradients are needed"
        )


def _without_gradient(out: Tensor, query: Tensor) -> Tensor:
    """Computed from a cache: a backward pass through it raises, instead of losing what earlier tokens are due."""
    if query.requires_grad and torch.is_grad_enabled():
        return _NoGradient.apply(out, query)
    return out


def _attend_groups(
    state: LayerState,
    query: Tensor,
    pending: PendingKV,
    plan: ForwardPlan,
    position_ids: Tensor | None,
    scale: float,
    records: Sequence[CallRecord],
) -> Tensor:
    """New tokens after others: the heads that hold the same keys together."""
    layer, (batch, _, q_len, _) = pending.layer, query.shape
    for record in records:
        record.open(None, query, layer.num_tokens + q_len, by_position=True)
    told = branch_records(records, "deployed")
    groups = layer.extend(pending.keys, pending.values, plan, position_ids, by_position=bool(records))
    grouped = query.unflatten(1, (state.layout.num_kv_heads, -1))
    out = None
    for group in groups:
        alone = len(groups) == 1
        part = query if alone else grouped.index_select(1, group.index).flatten(1, 2)
        inputs = part, group.keys, group.values
        if group.layout.selects:
            heads = LayerHeads.of(state.layout, state.methods).select(group.heads)
            # Dynamic heads keep every key: their groups have the same positions in all layers.
            call = {"positions": group.positions, "scale": scale, "known": plan.known, "records": told}
            attended = dynamic_attention(*inputs, heads, **call)
        else:
            for branch in told:
                branch.attended(group.layout, group.positions, batch, group.heads)
            attended = sparse_attention(*inputs, group.layout, positions=group.positions, scale=scale)
        if alone:
            return attended
        if out is None:
            # In the memory layout in which the model goes on with it.
            out = torch.empty(batch, q_len, *grouped.shape[1:3], attended.shape[-1], dtype=query.dtype,
                              device=query.device)  # fmt: skip
        out.index_copy_(2, group.index, attended.unflatten(1, (len(group.heads), -1)).permute(0, 3, 1, 2, 4))
    assert out is not None
    return out.flatten(2, 3).transpose(1, 2)
