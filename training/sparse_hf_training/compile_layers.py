"""`torch.compile` of each decoder layer (regional compilation) while it trains; all else runs as it was written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import LayerState
from sparse_hf.lora import unwrapped
from sparse_hf.patching import get_handle

logger = logging.getLogger(__name__)

_GRAPHS_PER_LAYOUT = 8  # dtypes, lengths, autocast on and off


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How layers are compiled.

    Args:
        backend: of torch.compile.
        mode: of torch.compile, or null.
        dynamic: one graph for all lengths (true), one per length (false), or torch's choice (null).
        fullgraph: refuse graph breaks; null: wherever no head selects keys by q and k.
    """

    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool | None = None


@dataclass
class CompiledLayers:
    """What `compile_layers` did; `undo` takes it back."""

    layers: list[nn.Module]
    states: list[LayerState]
    hooks: list[RemovableHandle]
    fullgraph: bool

    def undo(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            if isinstance(layer.__dict__.get("forward"), _TrainingForward):
                del layer.forward
        for state in self.states:
            if isinstance(state.gate, _HeldGate):
                state.gate = state.gate.source


def compile_layers(model: PreTrainedModel, config: CompileConfig) -> CompiledLayers:
    """Compiles the forward and backward passes of a sparsified model's layers, each on its own, in place.

    Layers that read alike share one graph. Only training goes through graphs: evaluation, generation and a teacher's
    pass run eagerly. A layer's `forward` is what is compiled, so that hooks (checkpointing, DDP, FSDP2) stay outside.

    Heads that select keys by q and k (xattention, flexprefill, minference) cannot be traced: their attention runs
    between two graphs of the layer.

    Args:
        model: with gates and adapter, if any, and without an engine around it.
        config: how.

    Raises:
        ValueError: if the model is not sparsified or sequence parallel, or `fullgraph` is asked for where heads select.
    """
    handle, base = get_handle(model), unwrapped(model)
    states = handle.states
    if any(state.exchange is not None for state in states):
        raise ValueError("layers that exchange slices of a row are not compiled; leave one of the two out")
    selects = any(state.layout.selects or state.full.selects or state.sparse.selects for state in states)
    if selects and config.fullgraph:
        raise ValueError(
            "compile.fullgraph: heads that select keys by q and k break the graph at their attention; leave it null"
        )
    fullgraph = not selects if config.fullgraph is None else config.fullgraph
    if selects:
        logger.info("compile: attention that selects keys by q and k runs between two graphs of each layer")
    layers = [_layer_of(base, module) for module in handle.modules]
    layouts = {layout for state in states for layout in (state.layout, state.full, state.sparse)}
    # The limit counts the graphs of all layers together, since they share their code.
    limit = _GRAPHS_PER_LAYOUT * (len(layouts) + 1)
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, limit)
    hooks = []
    for layer, state in zip(layers, states, strict=True):
        hooks.append(layer.register_forward_pre_hook(_BeforeLayer(state), with_kwargs=True))
        compiled = torch.compile(
            layer.forward, backend=config.backend, mode=config.mode, dynamic=config.dynamic, fullgraph=fullgraph
        )
        layer.forward = _TrainingForward(layer, layer.forward, compiled)
    return CompiledLayers(layers=layers, states=states, hooks=hooks, fullgraph=fullgraph)


def _layer_of(model: nn.Module, attention: nn.Module) -> nn.Module:
    for module in model.modules():
        if any(child is attention for child in module.children()):
            return module
    raise ValueError("the model has an attention module outside of its layers")


@dataclass
class _TrainingForward:
    layer: nn.Module
    eager: Callable[..., Any]
    compiled: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.compiled if self.layer.training and torch.is_grad_enabled() else self.eager
        return run(*args, **kwargs)


@dataclass
class _HeldGate:
    """A layer's gate as a tensor: a graph that indexed the gates of all layers would serve one layer."""

    source: Callable[[], Tensor | None]
    value: Tensor | None = None

    def __call__(self) -> Tensor | None:
        return self.value


@dataclass
class _BeforeLayer:
    """What a layer's graph gets from outside: its gate, and positions that do not depend on which layer asked first."""

    state: LayerState

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        gate = self.state.gate
        if gate is not None:
            if not isinstance(gate, _HeldGate):
                self.state.gate = gate = _HeldGate(gate)
            gate.value = gate.source()
        if layer.training and torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, ForwardPlan):
                    value.trace_positions(kwargs.get("position_ids"))
