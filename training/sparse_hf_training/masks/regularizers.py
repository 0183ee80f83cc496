"""What pulls gates towards sparsity. All see the closed-form expectation, never a draw: no collective is needed.

Each takes the expected sparsity s and the target t of every constraint, both `[num_constraints]`, and sums over
constraints by their share of the heads, so that one constraint on all layers weighs as much as one on each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

RegularizerKind = Literal["lagrangian", "abs", "l1"]
DEFAULT_WEIGHTS: dict[RegularizerKind, float] = {"lagrangian": 1.0, "abs": 1.0, "l1": 0.05}


class Regularizer(nn.Module, ABC):
    """A penalty on expected sparsities.

    Args:
        shares: of each constraint, adding up to 1.
        weight: factor on the whole.
    """

    def __init__(self, shares: Sequence[float] = (1.0,), *, weight: float = 1.0) -> None:
        super().__init__()
        self.shares, self.weight = tuple(shares), weight

    @abstractmethod
    def _terms(self, sparsity: Tensor, target: Tensor) -> Tensor:
        """The penalty of each constraint."""

    def forward(self, sparsity: Tensor, target: Tensor | Sequence[float] | float) -> Tensor:
        """The penalty, a scalar.

        Args:
            sparsity: expected, `[num_constraints]` (or a scalar for one), with gradient.
            target: likewise.
        """
        sparsity = sparsity.reshape(len(self.shares))
        terms = self._terms(sparsity, torch.as_tensor(target, dtype=sparsity.dtype, device=sparsity.device))
        return self.weight * self._weigh(terms).sum()

    def clamp_(self) -> None:
        """Applies bounds. Call it after each optimizer step."""

    def metrics(self) -> dict[str, float]:
        """Figures for logs."""
        return {}

    def _weigh(self, x: Tensor) -> Tensor:
        return x * x.new_tensor(self.shares)


class Lagrangian(Regularizer):
    """`lambda_1 (s - t) + lambda_2 (s - t)^2`, descended in s and ascended in the multipliers; a pair per constraint.

    LLM-Shearing (arXiv 2310.06694, section 2.1) and PruLong (arXiv 2506.17121). The ascent is a reversed gradient, so
    any optimizer and any engine performs it without knowing.

    Args:
        shares, weight: as in `Regularizer`.
        linear, quadratic: which terms there are.
        clamp: bound on |multipliers|; None for none.
    """

    def __init__(
        self,
        shares: Sequence[float] = (1.0,),
        *,
        weight: float = 1.0,
        linear: bool = True,
        quadratic: bool = True,
        clamp: float | None = None,
    ) -> None:
        super().__init__(shares, weight=weight)
        if not (linear or quadratic):
            raise ValueError("a Lagrangian needs its linear term, its quadratic term or both")
        self.linear = nn.Parameter(torch.zeros(len(self.shares), dtype=torch.float32)) if linear else None
        self.quadratic = nn.Parameter(torch.zeros(len(self.shares), dtype=torch.float32)) if quadratic else None
        self.clamp = clamp

    def _terms(self, sparsity: Tensor, target: Tensor) -> Tensor:
        gap = sparsity - target
        total = torch.zeros_like(gap)
        if self.linear is not None:
            total = total + _reversed(self.linear) * gap
        if self.quadratic is not None:
            total = total + _reversed(self.quadratic) * gap.square()
        return total

    @torch.no_grad()
    def clamp_(self) -> None:
        """Applies the bound; the quadratic multiplier never turns negative. Call it after each optimizer step."""
        limit = float("inf") if self.clamp is None else self.clamp
        if self.linear is not None:
            self.linear.clamp_(-limit, limit)
        if self.quadratic is not None:
            self.quadratic.clamp_(0, limit)

    def metrics(self) -> dict[str, float]:
        """The multipliers, weighted means over constraints."""
        named = {"linear": self.linear, "quadratic": self.quadratic}
        return {
            f"lagrangian/{name}": self._weigh(value.detach()).sum().item()
            for name, value in named.items()
            if value is not None
        }


class AbsoluteGap(Regularizer):
    """`|s - t|`, without multipliers (Elastic Attention's released code, arXiv 2601.17367)."""

    def _terms(self, sparsity: Tensor, target: Tensor) -> Tensor:
        return (sparsity - target).abs()


class L1(Regularizer):
    """`1 - s`: the mean expected gate, whatever the target.

    For `duo` gates this is DuoAttention's mean |alpha| (arXiv 2410.10819), for hard-concrete ones the L0 penalty of
    Louizos et al. (arXiv 1712.01312, equation 12).
    """

    def _terms(self, sparsity: Tensor, target: Tensor) -> Tensor:
        return 1 - sparsity


def make_regularizer(
    kind: RegularizerKind,
    shares: Sequence[float],
    *,
    weight: float | None = None,
    linear: bool = True,
    quadratic: bool = True,
    clamp: float | None = None,
) -> Regularizer:
    """A regulariser by name; `linear`, `quadratic` and `clamp` are the Lagrangian's.

    Raises:
        ValueError: for an unknown name, or a Lagrangian without a term.
    """
    if kind not in get_args(RegularizerKind):
        raise ValueError(f"regularizer must be one of {list(get_args(RegularizerKind))}, got {kind!r}")
    weight = DEFAULT_WEIGHTS[kind] if weight is None else weight
    if kind == "lagrangian":
        return Lagrangian(shares, weight=weight, linear=linear, quadratic=quadratic, clamp=clamp)
    return (AbsoluteGap if kind == "abs" else L1)(shares, weight=weight)


def _reversed(x: Tensor) -> Tensor:
    """x with the sign of its gradient turned."""
    return 2 * x.detach() - x
