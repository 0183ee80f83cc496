"""Hard-concrete gates: random variables in [0, 1] with mass at both ends and a gradient in between.

Louizos, Welling, Kingma: Learning Sparse Neural Networks through L0 Regularization, arXiv 1712.01312, section 2.2;
constants as in LLM-Shearing and PruLong (arXiv 2506.17121).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf_training.masks.gates.base import LogitGates

TEMPERATURE = 2 / 3
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
EPS = 1e-6
# P(z = 0) = sigmoid(ZERO_SHIFT - log_alpha)
ZERO_SHIFT = TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH)


class HardConcreteGates(LogitGates):
    """Expected sparsity is P(z = 0). The default init of 4.0 starts with E[z] = 0.98."""

    kind: ClassVar[str] = "hard_concrete"
    saturates: ClassVar[bool] = True

    def _sample(self, generator: torch.Generator) -> Tensor:
        u = torch.rand(self.log_alpha.shape, generator=generator).clamp(EPS, 1 - EPS).to(self.log_alpha.device)
        return _stretched(torch.sigmoid((u.logit() + self.log_alpha) / TEMPERATURE))

    def _sparsity(self) -> Tensor:
        # Equation 12.
        return torch.sigmoid(ZERO_SHIFT - self.log_alpha)

    def _deterministic(self) -> Tensor:
        # Equation 13.
        return _stretched(torch.sigmoid(self.log_alpha))


def _stretched(s: Tensor) -> Tensor:
    return (s * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)
