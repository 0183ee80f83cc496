"""Which positions predict a label."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def label_positions(labels: Tensor, *, shifted: bool = False) -> tuple[Tensor, Tensor]:
    """Where logits predict a label, and the labels.

    Args:
        labels: `[batch, seq_len]`, -100 where no loss is taken.
        shifted: labels[:, i] belongs to position i (it is the token at i + 1), as in `shift_labels`; rows that are
            sharded over processes come so, because the last position of a shard needs the next shard's first token.

    Returns:
        Boolean `[batch, seq_len]` marking the positions whose next token is a label, and the labels `[num_labels]`.
    """
    targets = labels if shifted else F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    kept = targets != IGNORE_INDEX
    return kept, targets[kept]
