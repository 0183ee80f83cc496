"""Batches of whole rows to this rank's slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_training.data.documents import IGNORE_INDEX
from sparse_hf_training.sequence_parallel.groups import SequenceGroup


def shard_batch(batch: Mapping[str, Any], group: SequenceGroup) -> dict[str, Any]:
    """This rank's slice of each row.

    Args:
        batch: `input_ids` and, unshifted, `labels`, `[batch, seq_len]`; `position_ids` `[batch or 1, seq_len]` that
            restart where packed documents begin, by default 0, 1, ...; other tensors of `[..., seq_len]` in two
            dimensions are cut alike, anything else passes. All ranks of the group give the same batch.
        group: the ranks that share it.

    Returns:
        The same keys, except that `labels` became `shift_labels`: at each position the label that its logits predict,
        shifted over the whole row before the cut.

    Raises:
        ValueError: if the group's size does not divide `seq_len`, or the labels were shifted or cut before.
    """
    if "shift_labels" in batch:
        raise ValueError("the batch has shift_labels already; give unshifted labels of whole rows")
    length = batch["input_ids"].shape[1]
    if length % group.size:
        raise ValueError(
            f"rows of {length} tokens cannot be cut into {group.size} equal slices; collate them with "
            f"pad_to_multiple_of={group.size} (sparse_hf_training.data.collate), or choose a multiple as seq_len"
        )
    whole = dict(batch)
    if whole.get("position_ids") is None:
        whole["position_ids"] = torch.arange(length, device=batch["input_ids"].device)[None]
    if whole.get("labels") is not None:
        whole["shift_labels"] = F.pad(whole.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
    part = length // group.size
    return {
        key: value[:, group.rank * part : (group.rank + 1) * part].contiguous() if _is_row(value, length) else value
        for key, value in whole.items()
    }


@dataclass(frozen=True)
class ShardingCollator:
    """A collator of whole rows, and of what it makes this rank's slice.

    Args:
        collate: makes a batch of rows.
        group: the ranks that share it.
    """

    collate: Callable[[list[Any]], Mapping[str, Any]]
    group: SequenceGroup

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        return shard_batch(self.collate(rows), self.group)


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length
