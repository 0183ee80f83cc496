"""What `sparsify` leaves on each attention module. Plain Python: no parameter, nothing in the state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparse_hf.methods.base import Method
from sparse_hf_kernels import AttentionLayout

if TYPE_CHECKING:
    from sparse_hf.call_record import Recorder
    from sparse_hf.head_exchange import HeadExchange

_ATTRIBUTE = "_sparse_hf_layer"
_OF_WHOLE_LEN = frozenset({"layout", "gate", "recorders", "exchange"})


@dataclass(kw_only=True)
class LayerState:
    """One layer's attention.

    Args:
        layer_idx: the layer's number.
        layout: what its heads read when deployed.
        full, sparse: the two branches that mask learning blends.
        methods, full_methods, sparse_methods: what their KV heads follow; asked where a layout selects by q and k.
        gate: returns the gates `[num_kv_heads]` that are being learned, or None when the deployed layout counts.
        skip_saturated: the gates have no gradient where they are exactly 0 or 1.
        max_position: tokens that the model was made for.
        recorders: of the captures that are under way.
        exchange: of a model whose inputs are slices of the sequence; None when they are whole.
        numbers: the KV heads' numbers in the layer, for parameters per head; None when they are all of them.
        order: of a rank's share, the KV heads of all ranks in turn; None where that is their own order.
        kept_shares: of `head_exchange.layer_share`.
        whole_len: sequences of up to so many tokens are dense in every head, and nothing is asked of the attention but
            its output; follows from the others.
    """

    layer_idx: int
    layout: AttentionLayout
    full: AttentionLayout
    sparse: AttentionLayout
    max_position: int
    methods: tuple[Method, ...] = ()
    full_methods: tuple[Method, ...] = ()
    sparse_methods: tuple[Method, ...] = ()
    gate: Callable[[], Tensor | None] | None = None
    skip_saturated: bool = False
    recorders: tuple[Recorder, ...] = ()
    exchange: HeadExchange | None = None
    numbers: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    kept_shares: list[tuple[tuple[Any, ...], LayerState]] = field(default_factory=list, init=False, repr=False)
    whole_len: int = field(init=False, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        # Asked in every call of the attention, changed seldom.
        if name in _OF_WHOLE_LEN:
            bare = self.gate is None and not self.recorders and self.exchange is None
            object.__setattr__(self, "whole_len", self.layout.whole_len if bare else 0)

    def selects(self, gate: Tensor | None) -> bool:
        """Some head that the call needs chooses by q and k."""
        return self.layout.selects if gate is None else self.full.selects or self.sparse.selects

    def current_gate(self) -> Tensor | None:
        return None if self.gate is None else self.gate()


def get_layer_state(module: nn.Module) -> LayerState | None:
    return getattr(module, _ATTRIBUTE, None)


def set_layer_state(module: nn.Module, state: LayerState) -> None:
    setattr(module, _ATTRIBUTE, state)


def clear_layer_state(module: nn.Module) -> None:
    if hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)
