"""Rows of equal length to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_hf_training.data.documents import IGNORE_INDEX


def collate(
    rows: Sequence[Mapping[str, Any]], *, pad_to_multiple_of: int | None = None, pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Stack rows; every value of shape [seq_len] becomes an int64 tensor of shape [batch, seq_len].

    Args:
        rows: with the same keys and one length.
        pad_to_multiple_of: lengthen rows at their end to a multiple of this, as sequence parallelism needs it. The
            padding has labels -100 and positions that restart at 0, so that it is a document of its own.
        pad_token_id: input id of the padding.

    Raises:
        ValueError: no rows, rows with different keys, values of different lengths, or a key that cannot be padded.
    """
    if not rows:
        raise ValueError("a batch needs at least one row, got none")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be None or >= 1, got {pad_to_multiple_of}")
    keys = list(rows[0])
    for row in rows:
        if set(row) != set(keys):
            raise ValueError(f"rows of one batch must have the same keys, got {sorted(keys)} and {sorted(row)}")
    lengths = {len(row[key]) for row in rows for key in keys}
    if len(lengths) > 1:
        per_row = [{key: len(row[key]) for key in keys} for row in rows]
        raise ValueError(f"rows of one batch must have one length, got {per_row}; pack all sources to one seq_len")
    batch = {key: torch.stack([torch.as_tensor(row[key], dtype=torch.int64) for row in rows]) for key in keys}
    missing = -lengths.pop() % pad_to_multiple_of if pad_to_multiple_of else 0
    if not missing:
        return batch
    padding = {
        "input_ids": torch.full((missing,), pad_token_id),
        "labels": torch.full((missing,), IGNORE_INDEX),
        "position_ids": torch.arange(missing),
    }
    if unknown := set(keys) - set(padding):
        raise ValueError(f"only {', '.join(padding)} can be padded, got {', '.join(sorted(unknown))} too")
    return {key: torch.cat([value, padding[key].expand(len(rows), -1)], dim=1) for key, value in batch.items()}
