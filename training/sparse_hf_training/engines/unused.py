"""One number to train for DeepSpeed, which fails on a model whose weights are all frozen.

The stage that learns masks alone trains no weight, and still wants ZeRO-3 to shard the frozen ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

UNUSED = "sparse_hf_unused"


def add_unused_parameter(model: nn.Module) -> None:
    """Gives the model a parameter that nothing reads."""
    if UNUSED not in model._parameters:
        weight = next(model.parameters())
        model.register_parameter(UNUSED, nn.Parameter(torch.zeros(1, dtype=weight.dtype, device=weight.device)))


def touch_unused_parameter(model: nn.Module, loss: Tensor) -> Tensor:
    """The same loss, by which the parameter, where there is one, has a gradient of zero."""
    unused = getattr(model, UNUSED, None)  # DeepSpeed's engine hands on what it does not have itself
    return loss if unused is None else loss + 0 * unused.sum()


def remove_unused_parameter(model: nn.Module) -> None:
    """Takes it away again."""
    model._parameters.pop(UNUSED, None)
