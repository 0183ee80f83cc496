"""The constraint on sparsity: multipliers that rise for as long as the target is missed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Lagrangian(nn.Module):
    """`lambda_1 (s - t) + lambda_2 (s - t)^2`, descended in s and ascended in the multipliers.

    LLM-Shearing (arXiv 2310.06694, section 2.1) and PruLong (arXiv 2506.17121). The ascent is a reversed gradient, so
    any optimizer and any engine performs it without knowing.

    Args:
        clamp: bound on |multipliers|; None for none.
    """

    def __init__(self, *, clamp: float | None = None) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.quadratic = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.clamp = clamp

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """The penalty, a scalar, for the expected sparsity (a scalar with gradient) and its target."""
        gap = sparsity - target
        return _reversed(self.linear) * gap + _reversed(self.quadratic) * gap.square()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Applies the bound; the quadratic multiplier never turns negative. Call it after each optimizer step."""
        limit = float("inf") if self.clamp is None else self.clamp
        self.linear.clamp_(-limit, limit)
        self.quadratic.clamp_(0, limit)


def _reversed(x: Tensor) -> Tensor:
    """x with the sign of its gradient turned."""
    return 2 * x.detach() - x
