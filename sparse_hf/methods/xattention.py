"""`xattention`: the blocks that hold most of the attention, estimated from antidiagonals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf.methods.dynamic import DynamicMethod, block_distances, keep_marked, per_head, picked, require_share
from sparse_hf_kernels import BlockSelection
from sparse_hf_kernels.scoring import select_top_p, xattention_block_mass
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.scoring.xattention.op import STRIDES


@dataclass(frozen=True, kw_only=True)
class XAttention(DynamicMethod):
    """For each block of queries the fewest blocks whose estimated mass reaches `threshold` of the row's.

    A block's mass is what a softmax over tiles of `stride` x `stride` pairs gives it, the logit of a tile being the sum
    over its antidiagonal times `scale / stride`. The first block and the diagonal come first and count. Chunks that
    begin at multiples of `block_size` choose what the whole prefill chooses.

    Args:
        stride: 4, 8 or 16; the estimate costs 1 / stride of the dense scores.
        threshold: share in [0, 1], or one per query head of the layer.
        sparsity_ratio: share of blocks to leave out, instead of the threshold: a row keeps its
            ceil((1 - sparsity_ratio) * causal blocks) of largest mass, the two forced ones among them.
    """

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "blocks that hold `threshold` of the mass that antidiagonals estimate"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428, sections 2.1 and 2.2"

    stride: int = 16
    threshold: float | tuple[float, ...] = 0.9
    sparsity_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.stride) is not int or self.stride not in STRIDES:
            raise ValueError(f"xattention: stride must be one of {STRIDES}, got {self.stride!r}")
        if isinstance(self.threshold, list):  # JSON and YAML give lists
            object.__setattr__(self, "threshold", tuple(self.threshold))
        for value in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            require_share(self, value, "threshold")
        if self.sparsity_ratio is not None:
            require_share(self, self.sparsity_ratio, "sparsity_ratio")

    def check_heads(self, num_heads: int) -> None:
        if isinstance(self.threshold, tuple) and len(self.threshold) != num_heads:
            raise ValueError(
                f"xattention: threshold holds {len(self.threshold)} values, the layer has {num_heads} query heads; "
                "give one per query head, or a number"
            )

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, scale: float, q_offset: int, heads: Sequence[int] | None = None
    ) -> BlockSelection:
        grid = BlockGrid.of(q, k, self.block_size, q_offset)
        mass = xattention_block_mass(
            q, k, stride=self.stride, block_size=self.block_size, scale=scale, q_offset=q_offset
        )
        if self.sparsity_ratio is not None:
            counts, indices = _largest(mass, 1 - self.sparsity_ratio, grid)
        else:
            threshold: float | Tensor
            if isinstance(self.threshold, tuple):
                values = picked(self.threshold, heads, q.shape[1])
                threshold = per_head(values, torch.float32, q.device)
            else:
                threshold = self.threshold
            counts, indices = select_top_p(mass, threshold, first_block=grid.first_block)
        return BlockSelection(block_size=self.block_size, counts=counts, indices=indices)


def _largest(mass: Tensor, share: float, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """For each row `share` of its causal blocks, rounded up, those of largest mass; forced ones come first."""
    distance = block_distances(grid, mass.device)
    forced = (distance == 0) | (torch.arange(grid.num_kv_blocks, device=mass.device) == 0)
    rank = mass.masked_fill(forced, float("inf")).masked_fill(distance < 0, -1)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    causal = distance[:, :1] + 1
    # What 1 - ratio lost in rounding must not become a block.
    number = (share * causal.double() - 1e-6).ceil()
    kept = (torch.arange(mass.shape[-1], device=mass.device) < number).expand_as(mass)
    return keep_marked(torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, kept), grid.first_block)
