"""Liger's fused linear cross-entropy (https://github.com/linkedin/Liger-Kernel), an optional package."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from sparse_hf_training.objectives.labels import IGNORE_INDEX


def is_liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def liger_cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats of rows @ weight^T, in chunks of Liger's choice; gradients of the weight in fp32.

    Args:
        rows: `[num_labels, hidden_size]`, at least one, requiring a gradient wherever the weight does: Liger computes
            the weight's only then.
        weight, bias: of the output embedding, `[vocab, hidden_size]` and `[vocab]`.
        targets: `[num_labels]`.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # Positional, as autograd functions are: no class weights, z-loss, smoothing or softcap.
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        rows, weight, targets, bias, None, IGNORE_INDEX, 0.0, 0.0, "sum", None, False, torch.float32
    )
    return loss
