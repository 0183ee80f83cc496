"""Column gather and its scatter-add in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which entries name a token, and int64 rows that are safe to gather for all of them."""
    real = (indices >= 0) & (indices < length)
    return real, torch.where(real, indices, 0).long()


def gather_columns_naive(x: Tensor, indices: Tensor) -> Tensor:
    """See `gather_columns`, for one tensor."""
    group = indices.shape[1] // x.shape[1]
    real, rows = _rows(indices, x.shape[2])
    gathered = x.repeat_interleave(group, 1).gather(2, rows[..., None].expand(-1, -1, -1, x.shape[3]))
    return torch.where(real[..., None], gathered, 0.0)


def scatter_add_columns_naive(target: Tensor, columns: Tensor, indices: Tensor) -> None:
    """See `scatter_add_columns`."""
    group = indices.shape[1] // target.shape[1]
    real, rows = _rows(indices, target.shape[2])
    values = torch.where(real[..., None], columns, 0.0).to(target.dtype)
    rows = rows[..., None].expand(-1, -1, -1, target.shape[3])
    for member in range(group):
        target.scatter_add_(2, rows[:, member::group], values[:, member::group])
