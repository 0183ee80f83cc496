"""Losses token by token: on held text by position, and on the answers of recall samples apart.

A loss over all tokens hides what a model forgets: recall tokens are few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf_training.data import Row
from sparse_hf_training.data.sources import sample_row
from sparse_hf_training.objectives import LossHead, label_positions
from sparse_hf_training.tasks import RecallSample

NUM_BINS = 16
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Loss on held text in nats per token.

    Args:
        rows: mean of each row.
        edges: positions in a document that bound the bins, `NUM_BINS + 1` of them.
        bins: mean of each bin over all rows, NaN where no token lies.
    """

    rows: tuple[float, ...]
    edges: tuple[int, ...]
    bins: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.rows) / len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain: bins without a token are None."""
        return {**asdict(self), "bins": [None if mean != mean else mean for mean in self.bins]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextLoss:
        bins = tuple(float("nan") if mean is None else mean for mean in values["bins"])
        return cls(rows=tuple(values["rows"]), edges=tuple(values["edges"]), bins=bins)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, head: LossHead, input_ids: Tensor, position_ids: Tensor, kept: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy of each target `[num_targets]`; logits exist for a few thousand tokens at a time.

    Args:
        model: in evaluation mode.
        head: the model's.
        input_ids, position_ids: `[batch, seq_len]`.
        kept: `[batch, seq_len]`, where a target is predicted.
        targets: `[num_targets]`.
    """
    states = head.final_states(lambda: model(input_ids=input_ids, position_ids=position_ids, use_cache=False), kept)
    pieces = zip(states.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(head.module(part).float(), target, reduction="none") for part, target in pieces])


def text_loss(model: PreTrainedModel, rows: Iterable[Row], seq_len: int) -> TextLoss:
    """Loss of each row and by position in the document, each row's packed documents kept apart.

    Args:
        model: dense or sparse, in evaluation mode.
        rows: of `input_ids`, `labels`, `position_ids`, each `[seq_len]`.
        seq_len: tokens of a row.

    Raises:
        ValueError: if there is no row.
    """
    head, means = LossHead(model), list[float]()
    sums, counts = torch.zeros(NUM_BINS, dtype=torch.float64), torch.zeros(NUM_BINS, dtype=torch.float64)
    for row in rows:
        ids, labels, positions = (row[name][None].to(model.device) for name in ("input_ids", "labels", "position_ids"))
        kept, targets = label_positions(labels)
        losses = token_losses(model, head, ids, positions, kept, targets).double().cpu()
        bins = (positions[kept].cpu() * NUM_BINS // seq_len).clamp(max=NUM_BINS - 1)
        sums.index_add_(0, bins, losses)
        counts.index_add_(0, bins, torch.ones_like(losses))
        means.append(losses.mean().item())
    if not means:
        raise ValueError("no rows to judge the loss on; give more text or a shorter seq_len")
    edges = tuple(seq_len * n // NUM_BINS for n in range(NUM_BINS + 1))
    return TextLoss(rows=tuple(means), edges=edges, bins=tuple((sums / counts).tolist()))


@torch.no_grad()
def row_losses(model: PreTrainedModel, head: LossHead, rows: Sequence[Row], batch_size: int = 1) -> Iterator[float]:
    """Mean loss of each row's labels; rows have one length."""
    for first in range(0, len(rows), batch_size):
        ids, labels, positions = (
            torch.stack([row[name] for row in rows[first : first + batch_size]]).to(model.device)
            for name in ("input_ids", "labels", "position_ids")
        )
        kept, targets = label_positions(labels)
        losses = token_losses(model, head, ids, positions, kept, targets)
        for part in losses.split(kept.sum(1).tolist()):
            yield part.mean().item()


def answer_losses(
    model: PreTrainedModel, head: LossHead, samples: Sequence[RecallSample], batch_size: int = 1
) -> Iterator[float]:
    """Mean loss of each sample's answers, given all that precedes them; samples have one length."""
    return row_losses(model, head, [sample_row(sample, sample.answer_spans) for sample in samples], batch_size)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
