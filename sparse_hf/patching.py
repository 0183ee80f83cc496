"""`sparsify` and its inverses. They touch one model instance, at call time only, and leave no trace when undone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from sparse_hf.adapters import ModelShape, adapter_for
from sparse_hf.attention import ATTENTION_NAME, sparse_attention_forward
from sparse_hf.break_even import resolve_min_seq_len
from sparse_hf.chunked_prefill import PREFILL_METHOD, prefill
from sparse_hf.config import SparseConfig
from sparse_hf.dynamic import LayerHeads
from sparse_hf.forward_plan import forward_plan_mask
from sparse_hf.generate_cache import CACHE_METHOD, prepare_cache
from sparse_hf.head_masks import check_head_masks, keyword_head_masks
from sparse_hf.layer_state import LayerState, clear_layer_state, set_layer_state
from sparse_hf.lora import remove_adapter, unwrapped
from sparse_hf.methods import HeadPlace, Method
from sparse_hf.own_positions import watch_decoder
from sparse_hf_kernels import UNBOUNDED, AttentionLayout, layout_key

_ATTRIBUTE = "_sparse_hf_handle"
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@dataclass(kw_only=True, eq=False)
class SparseHandle:
    """What `sparsify` did to a model: enough to describe it and to undo it.

    `resolved` is `config` with `min_seq_len` as a number; `hooks`: of the decoder; `added_adapter`: a LoRA adapter came
    with the masks.
    """

    config: SparseConfig
    resolved: SparseConfig
    head_masks: Tensor
    shape: ModelShape
    modules: list[nn.Module]
    states: list[LayerState]
    methods: list[list[Method]]
    original_config: PretrainedConfig
    original_values: dict[str, Any]
    original_attention: str
    hooks: tuple[RemovableHandle, ...]
    added_adapter: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled model may be read in a process that has sparsified none.
        vars(self).update(state)
        _register_attention()


def _register_attention() -> None:
    AttentionInterface.register(ATTENTION_NAME, sparse_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, forward_plan_mask)


def is_sparsified(model: PreTrainedModel) -> bool:
    return hasattr(unwrapped(model), _ATTRIBUTE)


def get_handle(model: PreTrainedModel) -> SparseHandle:
    """The handle of a sparsified model.

    Raises:
        ValueError: if the model is not sparsified.
    """
    handle = getattr(unwrapped(model), _ATTRIBUTE, None)
    if handle is None:
        raise ValueError("the model is not sparsified; call sparsify(model, ...) first")
    return handle


def apply_config(model: PreTrainedModel, config: SparseConfig, head_masks: Tensor | None = None) -> PreTrainedModel:
    """Makes the model's attention sparse, in place.

    Args:
        model: a causal language model of a supported family.
        config: what is sparse.
        head_masks: `[num_layers, num_kv_heads]` of 0 and 1; by default what the configuration names.

    Raises:
        ValueError: if the model is sparsified already, its family, dtype or head_dim is unsupported, or masks or rules
            do not fit it. The model is then unchanged.
    """
    if is_sparsified(model):
        raise ValueError("the model is sparsified already; call unsparsify(model) first")
    outer, model = model, unwrapped(model)
    adapter = adapter_for(model)
    shape = adapter.shape(model.config)
    _check_support(model, shape)
    if head_masks is None:
        head_masks = keyword_head_masks(config.head_masks, shape)
    masks = check_head_masks(head_masks, shape)
    methods = config.resolve(masks.tolist())
    windows = [adapter.native_window(model.config, layer) for layer in range(shape.num_layers)]
    resolved = resolve_min_seq_len(config, device=model.device, head_dim=shape.head_dim)
    states = _layer_states(resolved, methods, shape, windows, _max_position(model.config))
    check_dynamic_heads([state.layout for state in states], methods, shape)
    modules = adapter.attention_modules(model)
    assert len(modules) == shape.num_layers
    original = model.config
    # A configuration object may be shared between models; this one must not reach another.
    _replace_config(outer, original, copy.copy(original))
    _register_attention()
    for module, state in zip(modules, states, strict=True):
        set_layer_state(module, state)
    handle = SparseHandle(
        config=config,
        resolved=resolved,
        head_masks=masks,
        shape=shape,
        modules=modules,
        states=states,
        methods=methods,
        original_config=original,
        original_values=dict(vars(original)),
        original_attention=original._attn_implementation,
        # PeftModel calls the model's `forward`, past its hooks; the decoder's are always run.
        hooks=watch_decoder(model.base_model),
    )
    setattr(model, _ATTRIBUTE, handle)
    # No bound methods: a pickle would look for them by the functions' names, which the model's class does not have.
    setattr(model, CACHE_METHOD, partial(prepare_cache, model))
    setattr(model, PREFILL_METHOD, partial(prefill, model))
    model.config._attn_implementation = ATTENTION_NAME
    return outer


def unsparsify(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `sparsify` exactly: the same modules, the same configuration object, bitwise the same logits.

    Raises:
        ValueError: if the model is not sparsified.
    """
    handle = get_handle(model)
    outer, model = model, unwrapped(model)
    for module in handle.modules:
        clear_layer_state(module)
    for hook in handle.hooks:
        hook.remove()
    delattr(model, CACHE_METHOD)
    delattr(model, PREFILL_METHOD)
    delattr(model, _ATTRIBUTE)
    # What the user set meanwhile (resize_token_embeddings, use_cache) stays; the attention's name is ours alone.
    for name, value in vars(model.config).items():
        if name != "_attn_implementation_internal" and value is not handle.original_values.get(name):
            setattr(handle.original_config, name, value)
    _replace_config(outer, model.config, handle.original_config)
    if handle.added_adapter:
        remove_adapter(model)
    return outer


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The same model with the attention it came with, for the length of a `with` block; exceptions included.

    Raises:
        ValueError: if the model is not sparsified.
    """
    handle = get_handle(model)
    if any(state.exchange is not None for state in handle.states):
        # The model's own attention would see this rank's slice of the sequence alone.
        with dense_heads(model):
            yield model
        return
    # The sparsified model's own configuration: `unsparsify` inside the block puts another in its place.
    config = unwrapped(model).config
    before = config._attn_implementation
    config._attn_implementation = handle.original_attention
    try:
        yield model
    finally:
        config._attn_implementation = before


@contextmanager
def dense_heads(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The same model with every head dense in our own attention, within the model's windows, for a `with` block.

    What `dense` computes, but packed sequences need no N x N mask, and sequence parallelism goes on.

    Raises:
        ValueError: if the model is not sparsified.
    """
    states = get_handle(model).states
    before = [(state.layout, state.methods, state.gate) for state in states]
    put = [_dense_layout(layout.num_kv_heads, layout.max_distance) for layout, _, _ in before]
    for state, layout in zip(states, put, strict=True):
        state.layout, state.methods, state.gate = layout, (), None
    try:
        yield model
    finally:
        for state, layout, (old_layout, methods, gate) in zip(states, put, before, strict=True):
            state.gate = gate
            if state.layout is layout:  # else other head masks were set meanwhile
                state.layout, state.methods = old_layout, methods


@lru_cache(maxsize=64)
def _dense_layout(num_kv_heads: int, max_distance: int) -> AttentionLayout:
    layout = AttentionLayout.dense(num_kv_heads, max_distance)
    layout_key(layout)  # torch.compile finds it on the layout
    return layout


def set_head_masks(model: PreTrainedModel, head_masks: Tensor) -> None:
    """Gives a sparsified model other head masks, in place; `SparseCache`s made before no longer fit.

    Raises:
        ValueError: if the model is not sparsified or the masks do not fit it.
    """
    handle = get_handle(model)
    head_masks = check_head_masks(head_masks, handle.shape)
    resolved, num_layers = handle.config.resolve(head_masks.tolist()), handle.shape.num_layers
    layouts = [
        head_layout(methods, handle.resolved, state.layout.max_distance, state.layer_idx, num_layers)
        for state, methods in zip(handle.states, resolved, strict=True)
    ]
    check_dynamic_heads(layouts, resolved, handle.shape)
    handle.head_masks, handle.methods = head_masks, resolved
    for state, layout, methods in zip(handle.states, layouts, resolved, strict=True):
        state.layout, state.methods = layout, tuple(methods)


def _layer_states(
    config: SparseConfig, methods: list[list[Method]], shape: ModelShape, windows: list[int], max_position: int
) -> list[LayerState]:
    def branch(value: int) -> list[list[Method]]:
        return config.resolve([[value] * shape.num_kv_heads] * shape.num_layers)

    full, sparse = branch(1), branch(0)
    return [
        LayerState(
            layer_idx=layer,
            layout=head_layout(methods[layer], config, windows[layer], layer, shape.num_layers),
            full=head_layout(full[layer], config, windows[layer], layer, shape.num_layers),
            sparse=head_layout(sparse[layer], config, windows[layer], layer, shape.num_layers),
            methods=tuple(methods[layer]),
            full_methods=tuple(full[layer]),
            sparse_methods=tuple(sparse[layer]),
            max_position=max_position,
        )
        for layer in range(shape.num_layers)
    ]


def head_layout(
    methods: list[Method], config: SparseConfig, max_distance: int, layer: int = 0, num_layers: int = 1
) -> AttentionLayout:
    """One layer's layout from its heads' methods; `max_distance` is the model's own window, `min_seq_len` a number."""
    places = (
        HeadPlace(layer=layer, kv_head=head, num_layers=num_layers, num_kv_heads=len(methods))
        for head in range(len(methods))
    )
    layout = AttentionLayout(
        patterns=tuple(method.pattern(place) for method, place in zip(methods, places, strict=True)),
        max_distance=max_distance,
        num_dense_rows=config.num_dense_rows,
    )
    layout_key(layout)  # torch.compile finds it on the layout
    return layout


def check_dynamic_heads(layouts: list[AttentionLayout], methods: list[list[Method]], shape: ModelShape) -> None:
    """Raises ValueError if dynamic methods cannot serve the heads that they were given."""
    for layer, (layout, row) in enumerate(zip(layouts, methods, strict=True)):
        try:
            LayerHeads.of(layout, row).check(shape.num_heads)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error


def _check_support(model: PreTrainedModel, shape: ModelShape) -> None:
    if shape.head_dim > MAX_HEAD_DIM or shape.head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, the model has {shape.head_dim}")
    if model.dtype not in SUPPORTED_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise ValueError(f"dtype must be one of {names}, the model has {model.dtype}; use model.to(torch.bfloat16)")


def _max_position(config: PretrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or UNBOUNDED


def _replace_config(model: nn.Module, old: PretrainedConfig, new: PretrainedConfig) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            setattr(module, "config", new)  # noqa: B010  (nn.Module declares no such attribute)
