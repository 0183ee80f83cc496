"""`strided`: a window and every l-th block before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import BlockRule, HeadPattern


@dataclass(frozen=True, kw_only=True)
class StridedRule(BlockRule):
    """Blocks with i - j < stride, or a distance that stride divides."""

    block_size: int
    stride: int

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        distance = q_blocks - k_blocks
        return ((distance < self.stride) | (distance % self.stride == 0)) & (distance >= 0)


@dataclass(frozen=True, kw_only=True)
class Strided(Method):
    """{i - j < l} and {(i - j) mod l = 0} in blocks, causal inside the diagonal one; both of the paper's heads in each.

    Args:
        block_size: tokens per block, 64 or 128 for the fused kernels.
        stride_blocks: l; cost is least near the square root of the number of blocks.
    """

    name: ClassVar[str] = "strided"
    summary: ClassVar[str] = "the last stride_blocks blocks, and every stride_blocks-th one before"
    source: ClassVar[str] = "Sparse Transformer, arXiv 1904.10509, section 4.3 (strided, by blocks)"

    block_size: int = 64
    stride_blocks: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "block_size", "stride_blocks")

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern(blocks=StridedRule(block_size=self.block_size, stride=self.stride_blocks))
