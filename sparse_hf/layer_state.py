"""What `sparsify` leaves on each attention module. Plain Python: no parameter, nothing in the state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_hf_kernels import AttentionLayout

_ATTRIBUTE = "_sparse_hf_layer"


@dataclass(kw_only=True)
class LayerState:
    """One layer's attention.

    Args:
        layer_idx: the layer's number.
        layout: what its heads read when deployed.
        full, sparse: the two branches that mask learning blends.
        gate: returns the gates `[num_kv_heads]` that are being learned, or None when the deployed layout counts.
        skip_saturated: the gates have no gradient where they are exactly 0 or 1.
        max_position: tokens that the model was made for.
    """

    layer_idx: int
    layout: AttentionLayout
    full: AttentionLayout
    sparse: AttentionLayout
    max_position: int
    gate: Callable[[], Tensor | None] | None = None
    skip_saturated: bool = False

    def current_gate(self) -> Tensor | None:
        return None if self.gate is None else self.gate()


def get_layer_state(module: nn.Module) -> LayerState | None:
    return getattr(module, _ATTRIBUTE, None)


def set_layer_state(module: nn.Module, state: LayerState) -> None:
    setattr(module, _ATTRIBUTE, state)


def clear_layer_state(module: nn.Module) -> None:
    if hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)
