"""Rows of equal length to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows; every value of shape [seq_len] becomes an int64 tensor of shape [batch, seq_len].

    Raises:
        ValueError: no rows, rows with different keys, or values of different lengths.
    """
    if not rows:
        raise ValueError("a batch needs at least one row, got none")
    keys = list(rows[0])
    for row in rows:
        if set(row) != set(keys):
            raise ValueError(f"rows of one batch must have the same keys, got {sorted(keys)} and {sorted(row)}")
    lengths = [len(row[key]) for row in rows for key in keys]
    if len(set(lengths)) > 1:
        per_row = [{key: len(row[key]) for key in keys} for row in rows]
        raise ValueError(f"rows of one batch must have one length, got {per_row}; pack all sources to one seq_len")
    return {key: torch.stack([torch.as_tensor(row[key], dtype=torch.int64) for row in rows]) for key in keys}
