"""The attention function that `sparsify` registers: one entry for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_hf.attend import attend
from sparse_hf.attention_at_once import attend_at_once, check_length
from sparse_hf.cache_layer import PendingKV
from sparse_hf.cached_attention import attend_cached, decode_at_once, first_at_once
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.head_exchange import layer_share, whole_row
from sparse_hf.layer_state import LayerState, get_layer_state

if TYPE_CHECKING:
    from sparse_hf.call_record import CallRecord

ATTENTION_NAME = "sparse_hf"
ASKED = frozenset({"output_attentions", "softcap", "s_aux"})
"""Arguments that sparse attention refuses, if they ask for anything."""


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
    if isinstance(key, PendingKV) and torch.compiler.is_compiling():
        return _forward_untraced(
            module, query, key, value, attention_mask, scaling, dropout, position_ids=position_ids, **kwargs
        )
    state = get_layer_state(module)
    if state is None or dropout or not ASKED.isdisjoint(kwargs):
        state = _checked_state(state, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = None
    if not isinstance(key, PendingKV):
        assert not isinstance(value, PendingKV)
        out = attend_at_once(state, query, key, value, attention_mask, position_ids, scale)
    elif query.shape[2] == 1:
        token = decode_at_once(state, query, key, attention_mask, scale)
        if token is not None:
            return token, None
    else:
        out = first_at_once(state, query, key, attention_mask, position_ids, scale)
    if out is None:
        run = _dispatch_recorded if state.recorders else _dispatch
        if state.exchange is not None:
            run = _dispatch_exchanged
        out = run(state, query, key, value, attention_mask, position_ids, scale)
    return out.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def _forward_untraced(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`sparse_attention_forward` over a cache, which graphs leave out."""
    return sparse_attention_forward(*args, **kwargs)


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
        out = attend_cached(state, query.to(key.values.dtype), key, plan, position_ids, scale, records)
        return out.to(query.dtype)  # what is stored may have another one
    assert isinstance(value, Tensor)
    plan = _checked_plan(attention_mask, query, key)
    check_length(plan, state)
    # Under autocast the rotary product leaves q and k in fp32, while v has autocast's dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return attend(state, query, key, value, plan, position_ids, scale, records)


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
    return exchange.to_sequence(attend(share, query, key, value, plan, position_ids, scale, ()), share.order)


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


def _checked_state(state: LayerState | None, dropout: float, kwargs: dict[str, Any]) -> LayerState:
    if state is None:
        raise ValueError(
            f"attn_implementation={ATTENTION_NAME!r} is set but this model was not sparsified; "
            "call sparsify(model, ...)"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is not supported, got {dropout}; load the model with attention_dropout=0.0 (GPT-2: "
            "attn_pdrop=0.0) in from_pretrained or its config.json, as layers keep the value that they were made with"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "sparse attention never forms attention weights; read them in `with dense(model)`, after "
            'model.set_attn_implementation("eager") there unless the model was loaded with eager attention'
        )
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
