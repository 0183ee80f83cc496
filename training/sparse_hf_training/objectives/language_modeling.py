"""Cross-entropy with the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def language_modeling_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats; logits `[num_labels, vocab]`, targets `[num_labels]`. Computed in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")
