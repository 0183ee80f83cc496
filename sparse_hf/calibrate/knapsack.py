"""One setting per head, least total error within a total cost: dynamic programming over heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNITS = 100
"""Steps of a head's cost between 0 and 1."""

Array = NDArray[np.float64]


class Knapsack:
    """All best choices up to a total cost.

    D[h][m] = min over settings s of D[h - 1][m - c(h, s)] + error(h, s), where c is the cost above the head's cheapest
    setting in whole units. XAttention's recurrence D[h][m] = max(D[h-1][m], P(h, m)) (arXiv 2503.16428, section 2.3)
    counts in m how often thresholds were lowered; here m is the cost itself, which a target can be stated in.

    Args:
        costs: `[heads, settings]` in [0, 1].
        errors: `[heads, settings]`, not negative.
        max_cost: mean cost per head up to which choices are sought.
        units: steps per head; costs are rounded to them, so that sums may be off by half a step per head.
    """

    def __init__(self, costs: Array, errors: Array, *, max_cost: float = 1.0, units: int = UNITS) -> None:
        self.costs, self.errors = np.asarray(costs, np.float64), np.asarray(errors, np.float64)
        self.units, heads = units, len(self.costs)
        cheapest = self.costs.min(1, keepdims=True)
        self._steps = np.rint((self.costs - cheapest) * units).astype(np.int64)
        room = max(int(np.ceil((max_cost * heads - cheapest.sum()) * units + heads / 2)), 0)
        columns = min(room, int(self._steps.max(1).sum())) + 1
        best = np.zeros(columns)  # a budget need not be used up
        self._choice = np.zeros((heads, columns), np.uint8)
        for head in range(heads):
            total = np.full(columns, np.inf)
            for setting, step in enumerate(self._steps[head].tolist()):
                if step < columns:
                    candidate = best[: columns - step] + self.errors[head, setting]
                    better = candidate < total[step:]
                    np.copyto(total[step:], candidate, where=better)
                    np.copyto(self._choice[head, step:], setting, where=better)
            best = total
        self.best = best
        """Least total error by budget in units above the cheapest settings; does not grow."""

    def choices(self, budget: int) -> list[int]:
        """The setting of each head at a budget in units above the cheapest."""
        chosen = [0] * len(self.costs)
        for head in reversed(range(len(chosen))):
            chosen[head] = int(self._choice[head, budget])
            budget -= int(self._steps[head, chosen[head]])
        return chosen

    def cost(self, choices: Sequence[int]) -> float:
        """Mean cost per head, unrounded."""
        return float(self.costs[np.arange(len(choices)), list(choices)].mean())

    def error(self, choices: Sequence[int]) -> float:
        """Total error."""
        return float(self.errors[np.arange(len(choices)), list(choices)].sum())

    def within_cost(self, cost: float) -> list[int]:
        """The choices of least error whose mean cost, unrounded, is at most `cost`.

        Raises:
            ValueError: if even the cheapest cost more.
        """
        least = float(self.costs.min(1).mean())
        if least > cost + 1e-12:
            raise ValueError(f"the cheapest settings cost {least:.4f}, more than {cost:.4f}")
        # Rounding moves sums by less than half a step per head: look from there downwards.
        heads = len(self.costs)
        highest = (cost - least) * heads * self.units + heads / 2
        for budget in range(min(len(self.best) - 1, int(highest)), -1, -max(1, heads // 64)):
            found = self.choices(budget)
            if self.cost(found) <= cost + 1e-12:
                return found
        return [int(setting) for setting in self.costs.argmin(1)]

    def within_error(self, error: float) -> list[int] | None:
        """The cheapest choices whose total error is at most `error`; None if there are none up to `max_cost`."""
        reached = np.flatnonzero(self.best <= error * (1 + 1e-12))
        return self.choices(int(reached[0])) if len(reached) else None
