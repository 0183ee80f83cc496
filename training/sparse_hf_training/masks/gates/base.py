"""What all kinds of gates share: one value per layer and KV head, or one per layer that its KV heads share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Granularity = Literal["kv_head", "layer"]


class Gates(nn.Module, ABC):
    """Gates of all layers, fp32. Every result is `[num_layers, num_kv_heads]`, whatever the granularity.

    Args:
        num_layers, num_kv_heads: of the model.
        granularity: `kv_head`, or `layer`: the KV heads of a layer share a gate.
        init: first value of every entry of `values`.
    """

    kind: ClassVar[str]
    saturates: ClassVar[bool]
    """A gate that is exactly 0 or 1 has no gradient, so the branch of weight 0 need not be computed."""

    def __init__(self, num_layers: int, num_kv_heads: int, *, granularity: Granularity, init: float) -> None:
        super().__init__()
        columns = num_kv_heads if granularity == "kv_head" else 1
        self.num_kv_heads, self.granularity, self.init = num_kv_heads, granularity, init
        self._make_values(torch.full((num_layers, columns), float(init), dtype=torch.float32))

    @abstractmethod
    def _make_values(self, first: Tensor) -> None:
        """Registers the parameter with these first values."""

    @property
    @abstractmethod
    def values(self) -> nn.Parameter:
        """What is learned, `[num_layers, num_kv_heads]` or `[num_layers, 1]`; larger = needs the full branch more."""

    @abstractmethod
    def _sample(self, generator: torch.Generator) -> Tensor:
        """A draw in [0, 1] of the shape of `values`, differentiable."""

    @abstractmethod
    def _sparsity(self) -> Tensor:
        """Expected sparsity of the shape of `values`, differentiable."""

    @abstractmethod
    def _deterministic(self) -> Tensor:
        """Gates without noise, of the shape of `values`."""

    @abstractmethod
    def clamp_(self) -> None:
        """Applies the bound of `values`. Call it after each optimizer step."""

    @abstractmethod
    def _of_masks(self, masks: Tensor) -> Tensor:
        """First values for masks of 0 and 1."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """A draw of the gates z, differentiable in `values`. Noise, where there is any, is made on the CPU."""
        return self._per_head(self._sample(generator))

    def expected_sparsity(self) -> Tensor:
        """Each gate's expected sparsity in closed form, differentiable in `values`."""
        return self._per_head(self._sparsity())

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """The gates without noise."""
        return self._per_head(self._deterministic())

    def scores(self) -> Tensor:
        """What heads are ranked by when masks are rounded: `values`, detached, on the CPU."""
        return self._per_head(self.values.detach().float().cpu())

    @torch.no_grad()
    def spread_(self, scores: Tensor, spread: float) -> None:
        """Moves the first values apart by the ranks of scores `[num_layers, num_kv_heads]`, whatever their scale.

        The lowest goes down by `spread`, the highest up by it, the others between at even distances. Gates of layers
        go by the mean over a layer's heads.
        """
        ranked = scores if self.granularity == "kv_head" else scores.mean(1, keepdim=True)
        ranks = ranked.flatten().argsort(stable=True).argsort()
        offsets = torch.linspace(-spread, spread, len(ranks))[ranks]
        self.values.add_(offsets.view(self.values.shape).to(self.values))

    @torch.no_grad()
    def start_from_(self, masks: Tensor) -> None:
        """First values from head masks `[num_layers, num_kv_heads]`: `init` for full heads, its opposite for sparse.

        Raises:
            ValueError: if a layer of one gate has both kinds of heads.
        """
        if self.granularity == "layer":
            mixed = [n for n, row in enumerate(masks.tolist()) if len(set(row)) > 1]
            if mixed:
                raise ValueError(
                    f"gates of granularity 'layer' cannot start from masks that mix heads in layers {mixed}; "
                    "use granularity 'kv_head'"
                )
            masks = masks[:, :1]
        self.values.copy_(self._of_masks(masks.to(self.values)))

    def _per_head(self, x: Tensor) -> Tensor:
        return x if self.granularity == "kv_head" else x.expand(-1, self.num_kv_heads).contiguous()


class LogitGates(Gates):
    """Gates whose parameter is an unbounded `log_alpha`: the logit of being open.

    Args:
        clamp: bound on |log_alpha|, so that no gate saturates beyond recall; None for none.
    """

    log_alpha: nn.Parameter

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        *,
        granularity: Granularity = "kv_head",
        init: float = 4.0,
        clamp: float | None = 6.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_layers, num_kv_heads, granularity=granularity, init=init, **kwargs)
        self.clamp = clamp

    def _make_values(self, first: Tensor) -> None:
        self.log_alpha = nn.Parameter(first)

    @property
    def values(self) -> nn.Parameter:
        return self.log_alpha

    @torch.no_grad()
    def clamp_(self) -> None:
        if self.clamp is not None:
            self.log_alpha.clamp_(-self.clamp, self.clamp)

    def _of_masks(self, masks: Tensor) -> Tensor:
        return abs(self.init) * (2 * masks - 1)
