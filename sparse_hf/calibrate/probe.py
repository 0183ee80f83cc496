"""Watching a model's attention: what calibration learns from, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparse_hf.adapters import adapter_for
from sparse_hf.forward_plan import ForwardPlan, forward_plan_mask
from sparse_hf_kernels import AttentionLayout, TokenPositions, sparse_attention

PROBE_NAME = "sparse_hf_probe"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall:
    """One layer's dense attention in a forward pass.

    Args:
        layer: its number.
        q: `[batch, num_heads, q_len, head_dim]`, after rotary embedding.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`.
        out: `[batch, num_heads, q_len, head_dim]`; register a hook on it to see its gradient.
        lse: natural log-sum-exp of the scores, fp32 `[batch, num_heads, q_len]`.
        scale: factor on the scores.
        positions: where the tokens stand.
        module: the attention module, which has the output projection.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    positions: TokenPositions
    module: nn.Module


Observer = Callable[[LayerCall], Tensor | None]
"""Looks at a call. What it returns, if anything, goes on in place of `out`."""


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Runs a model's attention densely, as it came, and shows every layer's call to the observer.

    Raises:
        ValueError: if the model's family is unsupported, or it is sparsified (call `unsparsify` first).
    """
    from sparse_hf.patching import is_sparsified

    if is_sparsified(model):
        raise ValueError("calibration looks at the dense model; call unsparsify(model) first")
    adapter = adapter_for(model)
    modules = adapter.attention_modules(model)
    windows = [adapter.native_window(model.config, layer) for layer in range(len(modules))]
    layers = {id(module): layer for layer, module in enumerate(modules)}

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: ForwardPlan | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = layers[id(module)]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key = query.to(value.dtype), key.to(value.dtype)
        if attention_mask is None:
            positions = TokenPositions.causal(query.shape[2], key.shape[2], query.device)
        else:
            positions = attention_mask.compute_positions(position_ids)
        layout = AttentionLayout.dense(key.shape[1], max_distance=windows[layer])
        out, lse = sparse_attention(query, key, value, layout, positions=positions, scale=scale, return_lse=True)
        call = LayerCall(
            layer=layer, q=query, k=key, v=value, out=out, lse=lse, scale=scale, positions=positions, module=module
        )
        replaced = observer(call)
        return (out if replaced is None else replaced).transpose(1, 2).contiguous(), None

    # The interfaces are tables of the whole process: the name is taken back, so nothing of the model stays in them.
    AttentionInterface.register(PROBE_NAME, attend)
    AttentionMaskInterface.register(PROBE_NAME, forward_plan_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = PROBE_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(PROBE_NAME, None)
