"""Attention of one layer over keys in one tensor: training, prefill, and transformers' own caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_hf.dynamic import LayerHeads, dynamic_attention, dynamic_mixed_attention
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import LayerState
from sparse_hf.methods import Method
from sparse_hf_kernels import AttentionLayout, TokenPositions, mixed_attention, sparse_attention

if TYPE_CHECKING:
    from sparse_hf.call_record import BranchRecord, CallRecord


def branch_records(records: Sequence[CallRecord], name: str) -> list[BranchRecord]:
    return [record.branches[name] for record in records]


def attend(
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ForwardPlan,
    position_ids: Tensor | None,
    scale: float,
    records: Sequence[CallRecord],
) -> Tensor:
    gate = state.current_gate()
    for record in records:
        record.open(gate, query, key.shape[2])
    if state.selects(gate):
        return _attend_dynamic(state, gate, query, key, value, plan, position_ids, scale, records)
    positions = plan.positions(position_ids)
    for record in records:
        assert isinstance(positions, TokenPositions), "nothing is traced while it is recorded"
        branches = {"deployed": state.layout} if gate is None else {"full": state.full, "sparse": state.sparse}
        for name, layout in branches.items():
            record.branches[name].attended(layout, positions, len(query))
    if gate is None:
        return sparse_attention(query, key, value, state.layout, positions=positions, scale=scale)
    return mixed_attention(
        query,
        key,
        value,
        gate,
        state.full,
        state.sparse,
        positions=positions,
        scale=scale,
        skip_saturated=state.skip_saturated,
    )


# Nothing here can be traced, least of all that positions are looked at.
@torch.compiler.disable
def _attend_dynamic(
    state: LayerState,
    gate: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ForwardPlan,
    position_ids: Tensor | None,
    scale: float,
    records: Sequence[CallRecord],
) -> Tensor:
    known = plan.known
    if "positions" not in known:
        known["positions"] = plan.compute_positions(position_ids)
    call: dict[str, Any] = {"positions": known["positions"], "scale": scale, "known": known}
    if gate is None:
        heads = layer_heads(state, state.layout, state.methods)
        return dynamic_attention(query, key, value, heads, records=branch_records(records, "deployed"), **call)
    full = layer_heads(state, state.full, state.full_methods)
    sparse = layer_heads(state, state.sparse, state.sparse_methods)
    told = branch_records(records, "full"), branch_records(records, "sparse")
    call |= {"skip_saturated": state.skip_saturated, "records": told}
    return dynamic_mixed_attention(query, key, value, gate, full, sparse, **call)


def layer_heads(state: LayerState, layout: AttentionLayout, methods: Sequence[Method]) -> LayerHeads:
    heads = LayerHeads.of(layout, methods)
    return heads if state.numbers is None else replace(heads, numbers=state.numbers)
