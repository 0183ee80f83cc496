"""What the masks are learned for: language modelling, and staying close to the dense model.

Both are means over the label tokens, and a run may use any weighted sum of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the terms.

    Args:
        lm: cross-entropy with the labels.
        kl: KL divergence from the dense base model's next-token distribution to the sparse one's, at the label tokens.
        temperature: of both distributions in the KL term.
    """

    lm: float = 0.0
    kl: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.lm < 0 or self.kl < 0 or self.lm + self.kl == 0:
            raise ValueError(
                f"objective: weights must not be negative and one must be positive, got {self.lm}, {self.kl}"
            )
        if self.temperature <= 0:
            raise ValueError(f"objective: temperature must be positive, got {self.temperature}")


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where logits predict a label, and the labels.

    Args:
        labels: `[batch, seq_len]`, unshifted, -100 where no loss is taken.

    Returns:
        Boolean `[batch, seq_len]` marking the positions whose next token is a label, and the labels `[num_labels]`.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    kept = targets != IGNORE_INDEX
    return kept, targets[kept]


def language_modeling_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats; logits `[num_labels, vocab]`, targets `[num_labels]`."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Summed KL(teacher || student) in nats, times temperature squared (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        logits, teacher_logits: `[num_labels, vocab]`.
        temperature: of both.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def select(logits: Tensor, kept: Tensor) -> Tensor:
    """The logits `[num_labels, vocab]` at the kept positions of `[batch, seq_len, vocab]`."""
    return torch.masked_select(logits, kept.unsqueeze(-1)).view(-1, logits.shape[-1])
