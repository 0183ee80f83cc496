"""DuoAttention's gates: a plain number in [0, 1] per KV head (arXiv 2410.10819, equation 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sparse_hf_training.masks.gates.base import Gates, Granularity


class DuoGates(Gates):
    """alpha, without noise and clamped to [0, 1] after each step; expected sparsity is 1 - alpha.

    fp32, where the published code keeps the model's bf16, in which a step of lr 0.02 near 1 is five roundings wide.
    """

    kind: ClassVar[str] = "duo"
    # alpha is 1 at the start, and its gradient is what moves it away.
    saturates: ClassVar[bool] = False
    alpha: nn.Parameter

    def __init__(
        self, num_layers: int, num_kv_heads: int, *, granularity: Granularity = "kv_head", init: float = 1.0
    ) -> None:
        super().__init__(num_layers, num_kv_heads, granularity=granularity, init=init)

    def _make_values(self, first: Tensor) -> None:
        self.alpha = nn.Parameter(first)

    @property
    def values(self) -> nn.Parameter:
        return self.alpha

    def _sample(self, generator: torch.Generator) -> Tensor:
        # A tensor of its own: what a forward pass has drawn does not move with the next step.
        return self.alpha.clone()

    def _sparsity(self) -> Tensor:
        return 1 - self.alpha

    def _deterministic(self) -> Tensor:
        return self.alpha.clone()

    @torch.no_grad()
    def clamp_(self) -> None:
        self.alpha.clamp_(0, 1)

    def _of_masks(self, masks: Tensor) -> Tensor:
        return torch.where(masks > 0, self.init, 1 - self.init)
