"""Hard-concrete gates: random variables in [0, 1] with mass at both ends and a gradient in between.

Louizos, Welling, Kingma: Learning Sparse Neural Networks through L0 Regularization, arXiv 1712.01312, section 2.2;
constants as in LLM-Shearing and PruLong (arXiv 2506.17121).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 2 / 3
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
EPS = 1e-6
# P(z = 0) = sigmoid(ZERO_SHIFT - log_alpha)
ZERO_SHIFT = TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH)


class HardConcreteGates(nn.Module):
    """One gate per layer and KV head.

    Args:
        num_layers, num_kv_heads: of the model.
        init: first value of every log_alpha; 4.0 starts with E[z] = 0.98.
        clamp: bound on |log_alpha|, so that no gate saturates beyond recall; None for none.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, *, init: float = 4.0, clamp: float | None = 6.0) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((num_layers, num_kv_heads), float(init), dtype=torch.float32))
        self.clamp = clamp

    def sample(self, generator: torch.Generator) -> Tensor:
        """A draw of z, fp32 `[num_layers, num_kv_heads]`, differentiable in log_alpha. The noise is made on the CPU."""
        u = torch.rand(self.log_alpha.shape, generator=generator).clamp(EPS, 1 - EPS).to(self.log_alpha.device)
        s = torch.sigmoid((u.logit() + self.log_alpha) / TEMPERATURE)
        return (s * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def zero_probability(self) -> Tensor:
        """P(z = 0) in closed form, fp32 `[num_layers, num_kv_heads]`: each gate's expected sparsity (equation 12)."""
        return torch.sigmoid(ZERO_SHIFT - self.log_alpha)

    def scores(self) -> Tensor:
        """What heads are ranked by when masks are rounded: log_alpha, detached, `[num_layers, num_kv_heads]`."""
        return self.log_alpha.detach().float().cpu()

    @torch.no_grad()
    def spread_(self, scores: Tensor, spread: float) -> None:
        """Moves the first values apart by the ranks of scores `[num_layers, num_kv_heads]`, whatever their scale.

        The lowest goes down by `spread`, the highest up by it, the others between at even distances.
        """
        ranks = scores.flatten().argsort(stable=True).argsort()
        offsets = torch.linspace(-spread, spread, len(ranks))[ranks]
        self.log_alpha.add_(offsets.view(self.log_alpha.shape).to(self.log_alpha))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Applies the bound. Call it after each optimizer step."""
        if self.clamp is not None:
            self.log_alpha.clamp_(-self.clamp, self.clamp)
