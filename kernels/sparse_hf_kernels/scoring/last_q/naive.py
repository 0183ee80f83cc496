"""Vertical and slash sums of the last queries in plain torch, fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def last_q_sums_naive(q: Tensor, k: Tensor, position: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `last_q_sums`; `q` holds the last rows alone, the first of them at `position`."""
    group = q.shape[1] // k.shape[1]
    rows, length = q.shape[2], k.shape[2]
    logits = q.float().unflatten(1, (-1, group)) @ k.float()[:, :, None].transpose(-1, -2) * scale
    distance = torch.arange(position, position + rows, device=q.device)[:, None] - torch.arange(length, device=q.device)
    weights = logits.masked_fill(distance < 0, float("-inf")).softmax(-1).flatten(1, 2)
    slash = torch.zeros(*weights.shape[:2], length, device=q.device, dtype=torch.float32)
    slash.index_add_(2, distance.clamp_min(0).flatten(), weights.flatten(2))  # future keys weigh 0
    return weights.sum(2), slash
