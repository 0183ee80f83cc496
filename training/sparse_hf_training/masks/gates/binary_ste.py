"""Binary gates with straight-through gradients: what is trained is what is deployed, a 0 or a 1.

The estimator: Bengio, Leonard, Courville, arXiv 1308.3432. Masks drawn with probability sigmoid(m): the supermasks of
Zhou et al., arXiv 1905.01067. Masks by a threshold on sigmoid(S), with the mean of sigmoid(S) as their regulariser:
soft movement pruning (Sanh, Wolf, Rush, arXiv 2005.07683; nn_pruning's ThresholdBinarizer).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparse_hf_training.masks.gates.base import LogitGates

Sampling = Literal["bernoulli", "threshold"]


class BinarySTEGates(LogitGates):
    """z is 1 with probability sigmoid(log_alpha), or where that is above 1/2; expected sparsity is the complement.

    Gradients: d loss / d log_alpha = d loss / dz * sigmoid'(log_alpha) for `bernoulli`, which is the gradient of the
    expectation wherever the loss is linear in z; = d loss / dz for `threshold`, as in movement pruning.

    Args:
        sampling: `bernoulli` or `threshold`.
    """

    kind: ClassVar[str] = "binary_ste"
    # The gradient passes through a gate of exactly 0 or 1: both branches are needed.
    saturates: ClassVar[bool] = False

    def __init__(self, num_layers: int, num_kv_heads: int, *, sampling: Sampling = "bernoulli", **kwargs: Any) -> None:
        super().__init__(num_layers, num_kv_heads, **kwargs)
        self.sampling: Sampling = sampling

    def _sample(self, generator: torch.Generator) -> Tensor:
        if self.sampling == "threshold":
            return _straight_through(self._deterministic(), self.log_alpha)
        u = torch.rand(self.log_alpha.shape, generator=generator).to(self.log_alpha.device)
        open_ = torch.sigmoid(self.log_alpha)
        return _straight_through((u < open_).float(), open_)

    def _sparsity(self) -> Tensor:
        return torch.sigmoid(-self.log_alpha)

    def _deterministic(self) -> Tensor:
        return (self.log_alpha > 0).float()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard`, exactly, with the gradient of `soft`; hard + soft - soft would round away from 0 and 1."""
    out: Tensor = _StraightThrough.apply(hard.detach(), soft)
    return out
