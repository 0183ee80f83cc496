"""Whether a decoder makes its position ids itself: those count on and never restart, so that nobody has to look.

To look is to wait for the device, which takes longer than a short layer. Only the decoder's own inputs say whose the
ids are: the mask function is not told, and the attention gets both alike.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_own: ContextVar[bool] = ContextVar("sparse_hf_own_positions", default=False)


def are_own() -> bool:
    """Within the forward pass of a watched decoder that was given no position ids.

    False where that is not known: in traced graphs, and where a decoder's `forward` is called past its hooks.
    """
    return not torch.compiler.is_compiling() and _own.get()


def watch_decoder(decoder: nn.Module) -> tuple[RemovableHandle, ...]:
    """Has `are_own` answer for a decoder of a supported family, until the handles are removed."""
    # The second hook is called after exceptions too: what was true of one forward pass says nothing of the next.
    return (
        decoder.register_forward_pre_hook(_begin, with_kwargs=True),
        decoder.register_forward_hook(_end, always_call=True),
    )


def _begin(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        # Of what may come by place, all families have position_ids behind the token ids.
        _own.set(len(args) < 2 and kwargs.get("position_ids") is None)


def _end(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        _own.set(False)
