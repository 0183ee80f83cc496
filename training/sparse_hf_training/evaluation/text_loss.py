"""Loss on held text, over packed rows."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from sparse_hf_training.data import Row, collate
from sparse_hf_training.objectives import label_positions, language_modeling_loss


@torch.no_grad()
def evaluate_text_loss(
    model: PreTrainedModel, rows: Dataset[Row], *, num_rows: int | None = None, batch_size: int = 1
) -> float:
    """Mean cross-entropy in nats per label token, each row's packed documents kept apart.

    Args:
        model: dense or sparse; it is judged in evaluation mode.
        rows: of `input_ids`, `labels`, `position_ids`, each `[seq_len]`.
        num_rows: judge only so many.
        batch_size: rows per forward pass.

    Raises:
        ValueError: if there is no row.
    """
    count = len(rows) if num_rows is None else min(num_rows, len(rows))  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("no rows to judge the loss on; give more text or a shorter seq_len")
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for start in range(0, count, batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, count))])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            kept, targets = label_positions(batch["labels"])
            total += language_modeling_loss(logits[kept], targets).item()
            tokens += targets.numel()
    finally:
        model.train(was_training)
    return total / tokens
