"""Which sparsity is asked of which layers, in the penalty and in rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_hf.head_masks import round_scores
from sparse_hf.layer_ranges import parse_ranges


@dataclass(frozen=True, kw_only=True)
class LayerBudget:
    """A head sparsity of its own for each of some layers.

    Args:
        layers: ranges such as "0-3", "16-", "-2", "0-3,8".
        head_sparsity: share of sparse KV heads in each of these layers, in [0, 1); 0 keeps every head full.
    """

    layers: str
    head_sparsity: float

    def __post_init__(self) -> None:
        parse_ranges(self.layers, None)
        if not 0 <= self.head_sparsity < 1:
            raise ValueError(f"layer_budgets: head_sparsity must lie in [0, 1), got {self.head_sparsity}")


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Every layer is held full, has a target of its own, or shares one target with the others.

    The constraints, in order: that of the shared layers, if there are any, then one for each layer of its own.

    Args:
        num_layers: of the model.
        shared_sparsity: of all heads of the shared layers together.
        own: head sparsity by layer, in (0, 1).
        held: layers whose heads all stay full; their gates are 1 and learn nothing.
    """

    num_layers: int
    shared_sparsity: float
    own: Mapping[int, float]
    held: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, budgets: Sequence[LayerBudget], shared_sparsity: float, num_layers: int, *, held: frozenset[int]
    ) -> Budgets:
        """From a configuration; of several budgets that name a layer, the last one counts.

        Raises:
            ValueError: if a budget names a layer that the model does not have, or asks sparsity of a held one, or no
                layer is left to learn.
        """
        by_layer: dict[int, float] = {}
        for budget in budgets:
            by_layer |= dict.fromkeys(parse_ranges(budget.layers, num_layers, what="layer"), budget.head_sparsity)
        if asked := sorted(layer for layer in held if by_layer.get(layer, 0) > 0):
            raise ValueError(f"layer_budgets ask layers {asked} to be sparse, which layers_from keeps full")
        held = held | {layer for layer, sparsity in by_layer.items() if sparsity == 0}
        if len(held) == num_layers:
            raise ValueError("every layer is kept full by layer_budgets or layers_from: there is nothing to learn")
        own = {layer: sparsity for layer, sparsity in sorted(by_layer.items()) if sparsity > 0}
        return cls(num_layers=num_layers, shared_sparsity=shared_sparsity, own=own, held=held)

    @property
    def shared(self) -> list[int]:
        """The layers of the shared target."""
        return [layer for layer in range(self.num_layers) if layer not in self.held and layer not in self.own]

    @property
    def ends(self) -> list[float]:
        """The head sparsity that each constraint ends with."""
        return [self.shared_sparsity] * bool(self.shared) + list(self.own.values())

    @property
    def shares(self) -> list[float]:
        """Each constraint's share of the heads that learn; they add up to 1."""
        free = self.num_layers - len(self.held)
        return [len(self.shared) / free] * bool(self.shared) + [1 / free] * len(self.own)

    def per_constraint(self, x: Tensor) -> Tensor:
        """Means over the heads of each constraint, `[num_constraints]`, of `[num_layers, num_kv_heads]`."""
        per_layer = x.mean(1)
        parts = [per_layer[self.shared].mean()[None]] if self.shared else []
        return torch.cat([*parts, per_layer[list(self.own)]])

    def round(self, scores: Tensor, head_sparsity: float | None = None) -> Tensor:
        """Masks like `scores` `[num_layers, columns]` with the lowest scores of each constraint 0.

        Args:
            scores: larger = stays full.
            head_sparsity: in place of that of the shared layers.

        Raises:
            ValueError: if it is given and no layer shares a target, or scores hold NaN.
        """
        shared = self.shared
        if head_sparsity is not None and not shared:
            raise ValueError("layer_budgets set the sparsity of every layer: no other head_sparsity can be asked for")
        masks = torch.ones(scores.shape, dtype=torch.long)
        if shared:
            masks[shared] = round_scores(
                scores[shared], self.shared_sparsity if head_sparsity is None else head_sparsity
            )
        for layer, sparsity in self.own.items():
            masks[layer] = round_scores(scores[layer], sparsity)
        return masks
