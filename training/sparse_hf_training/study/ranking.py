"""What a recipe hands over: a score for each head, and what it took to find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Heads in an order.

    Args:
        scores: `[num_layers, num_kv_heads]`, larger = stays full.
        tokens: that passed the model, once for each pass, forward alone and forward and backward alike.
        seconds: that it took; 0 until somebody looked at the clock.
    """

    scores: Tensor
    tokens: int
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"scores": self.scores.tolist(), "tokens": self.tokens, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ranking:
        return cls(**{**values, "scores": torch.tensor(values["scores"])})
