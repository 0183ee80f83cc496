"""The attention function that `sparsify` registers: one entry for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_hf.attention_at_once import attend_at_once, check_length, split_groups
from sparse_hf.cache import PendingKV
from sparse_hf.dynamic import LayerHeads, dynamic_attention, dynamic_mixed_attention
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.head_exchange import layer_share, whole_row
from sparse_hf.layer_state import LayerState, get_layer_state
from sparse_hf.methods import Method
from sparse_hf_kernels import AttentionLayout, TokenPositions, mixed_attention, sparse_attention

if TYPE_CHECKING:
    from sparse_hf.call_record import BranchRecord, CallRecord

ATTENTION_NAME = "sparse_hf"


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PendingKV,
    value: Tensor | PendingKV,
    attention_mask: ForwardPlan | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`.
        key, value: `[batch, num_kv_heads, kv_len, head_dim]`, or what a `SparseCache` returned.
        attention_mask: the `ForwardPlan` of this forward pass.
        position_ids: `[batch or 1, q_len]`; restarts separate packed sequences.

    Returns:
        Output `[batch, q_len, num_heads, head_dim]` and None (attention weights are never formed).

    Raises:
        ValueError: for what cannot be computed right: 4-D masks, dropout, attention weights, too long a sequence.
    """
    state = _checked_state(module, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = None
    if state.exchange is not None:
        out = _dispatch_exchanged(state, query, key, value, attention_mask, position_ids, scale)
    elif not torch.compiler.is_compiling():
        out = attend_at_once(state, query, key, value, attention_mask, position_ids, scale)
    if out is None:
        run = _dispatch_recorded if state.recorders else _dispatch
        out = run(state, query, key, value, attention_mask, position_ids, scale)
    return out.transpose(1, 2).contiguous(), None


def _dispatch(
    state: LayerState,
    query: Tensor,
    key: Tensor | PendingKV,
    value: Tensor | PendingKV,
    attention_mask: ForwardPlan | Tensor | None,
    position_ids: Tensor | None,
    scale: float,
    records: Sequence[CallRecord] = (),
) -> Tensor:
    """Output `[batch, num_heads, q_len, head_dim]`; `records` are told what is read."""
    if isinstance(key, PendingKV):
        plan = _checked_plan(attention_mask, query, None)
        check_length(plan, state)
        return _attend_cached(state, query.to(key.values.dtype), key, plan, position_ids, scale, records)
    assert isinstance(value, Tensor)
    plan = _checked_plan(attention_mask, query, key)
    check_length(plan, state)
    # Under autocast the rotary product leaves q and k in fp32, while v has autocast's dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _attend(state, query, key, value, plan, position_ids, scale, records)


def _dispatch_exchanged(
    state: LayerState,
    query: Tensor,
    key: Tensor | PendingKV,
    value: Tensor | PendingKV,
    attention_mask: ForwardPlan | Tensor | None,
    position_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """Under sequence parallelism: output for this rank's tokens, attended head by head over the whole row."""
    exchange = state.exchange
    assert exchange is not None
    if isinstance(key, PendingKV) or isinstance(value, PendingKV):
        raise ValueError(
            "a SparseCache cannot hold slices of a sequence; generate within sequence_parallel_disabled(model)"
        )
    if state.recorders:
        raise ValueError("capture sees whole sequences only; run it within sequence_parallel_disabled(model)")
    plan, position_ids = whole_row(exchange, _checked_plan(attention_mask, query, key), position_ids)
    check_length(plan, state)
    query, key = query.to(value.dtype), key.to(value.dtype)
    share = layer_share(state, query.shape[1])
    query, key, value = exchange.to_heads(query, key, value, share.order)
    return exchange.to_sequence(_attend(share, query, key, value, plan, position_ids, scale, ()), share.order)


# Records hold what graphs cannot.
@torch.compiler.disable
def _dispatch_recorded(
    state: LayerState,
    query: Tensor,
    key: Tensor | PendingKV,
    value: Tensor | PendingKV,
    attention_mask: ForwardPlan | Tensor | None,
    position_ids: Tensor | None,
    scale: float,
) -> Tensor:
    # In a backward pass a checkpoint is recomputed, which was recorded the first time.
    recomputed = torch._C._current_graph_task_id() != -1
    recorders = () if recomputed else state.recorders
    records = tuple(recorder.begin(state) for recorder in recorders)
    out = _dispatch(state, query, key, value, attention_mask, position_ids, scale, records)
    for recorder, record in zip(recorders, records, strict=True):
        recorder.add(record)
    return out


def _branch(records: Sequence[CallRecord], name: str) -> list[BranchRecord]:
    return [record.branches[name] for record in records]


def _attend(
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
        heads = _layer_heads(state, state.layout, state.methods)
        return dynamic_attention(query, key, value, heads, records=_branch(records, "deployed"), **call)
    full = _layer_heads(state, state.full, state.full_methods)
    sparse = _layer_heads(state, state.sparse, state.sparse_methods)
    told = _branch(records, "full"), _branch(records, "sparse")
    call |= {"skip_saturated": state.skip_saturated, "records": told}
    return dynamic_mixed_attention(query, key, value, gate, full, sparse, **call)


def _layer_heads(state: LayerState, layout: AttentionLayout, methods: Sequence[Method]) -> LayerHeads:
    heads = LayerHeads.of(layout, methods)
    return heads if state.numbers is None else replace(heads, numbers=state.numbers)


def _attend_cached(
    state: LayerState,
    query: Tensor,
    pending: PendingKV,
    plan: ForwardPlan,
    position_ids: Tensor | None,
    scale: float,
    records: Sequence[CallRecord],
) -> Tensor:
    if state.current_gate() is not None:
        raise ValueError("a SparseCache serves deployed masks; call model.eval() before generating while gates train")
    if pending.layer.layout != state.layout:
        raise ValueError("this SparseCache was made for other head masks or another model; make a new one")
    for record in records:
        record.open(None, query, pending.layer.num_tokens + query.shape[2], by_position=True)
    told = _branch(records, "deployed")
    split_groups(pending.layer)
    groups = pending.store(plan, position_ids)
    batch, _, q_len, head_dim = query.shape
    grouped = query.reshape(batch, state.layout.num_kv_heads, -1, q_len, head_dim)
    out = torch.empty_like(grouped)
    for group, positions in groups:
        inputs = grouped.index_select(1, group.index).flatten(1, 2), group.keys, group.values
        layout = state.layout.select(group.heads)
        if layout.selects:
            heads = LayerHeads.of(state.layout, state.methods).select(group.heads)
            # Dynamic heads keep every key: their groups have the same positions in all layers.
            known = plan.known
            attended = dynamic_attention(*inputs, heads, positions=positions, scale=scale, known=known, records=told)
        else:
            for branch in told:
                branch.attended(layout, positions, batch, group.heads)
            attended = sparse_attention(*inputs, layout, positions=positions, scale=scale)
        out.index_copy_(1, group.index, attended.unflatten(1, (len(group.heads), -1)))
    pending.release()
    return out.flatten(1, 2)


def _checked_state(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> LayerState:
    state = get_layer_state(module)
    if state is None:
        raise ValueError(
            f"attn_implementation={ATTENTION_NAME!r} is set but this model was not sparsified; "
            "call sparsify(model, ...)"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is not supported, got {dropout}; set config.attention_dropout (GPT-2: attn_pdrop) to 0"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("sparse attention never forms attention weights; use `with dense(model)` to read them")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"the model passes {name!r} to its attention, which sparse attention does not support")
    return state


def _checked_plan(attention_mask: ForwardPlan | Tensor | None, query: Tensor, key: Tensor | None) -> ForwardPlan:
    if isinstance(attention_mask, ForwardPlan):
        return attention_mask
    if attention_mask is not None:
        raise ValueError(
            f"sparse attention takes no {attention_mask.ndim}-D attention_mask; pass a 2-D padding mask "
            "[batch, tokens seen], and position_ids that restart for packed sequences"
        )
    if key is None:
        raise ValueError("a SparseCache needs the model's own mask; do not call the attention module by itself")
    # Callers that bypass the model's mask creation: plain causal attention over the keys that came.
    q_len, kv_len = query.shape[2], key.shape[2]
    return ForwardPlan(
        q_len=q_len, kv_len=kv_len, q_offset=kv_len - q_len, kv_offset=0, padding_mask=None, device=query.device
    )
