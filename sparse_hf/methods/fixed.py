"""`fixed`: the own segment, and the last blocks of every segment before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import BlockRule, HeadPattern


@dataclass(frozen=True, kw_only=True)
class FixedRule(BlockRule):
    """Blocks of the same segment of `stride`, and the last `num_summary` of each."""

    block_size: int
    stride: int
    num_summary: int

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        same = q_blocks // self.stride == k_blocks // self.stride
        return (same | (k_blocks % self.stride >= self.stride - self.num_summary)) & (k_blocks <= q_blocks)


@dataclass(frozen=True, kw_only=True)
class Fixed(Method):
    """{floor(j / l) = floor(i / l)} and {j mod l >= l - c} in blocks, causal inside the diagonal one.

    Args:
        block_size: tokens per block, 64 or 128 for the fused kernels.
        stride_blocks: l, blocks per segment.
        num_summary_blocks: c, blocks at the end of a segment that all later ones read; no more than l.
    """

    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "the own segment of stride_blocks blocks, and the last num_summary_blocks of those before"
    source: ClassVar[str] = "Sparse Transformer, arXiv 1904.10509, section 4.3 (fixed, by blocks)"

    block_size: int = 64
    stride_blocks: int = 32
    num_summary_blocks: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "block_size", "stride_blocks", "num_summary_blocks")
        if self.num_summary_blocks > self.stride_blocks:
            raise ValueError(
                f"fixed: num_summary_blocks must not exceed stride_blocks, "
                f"got {self.num_summary_blocks} and {self.stride_blocks}"
            )

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        rule = FixedRule(block_size=self.block_size, stride=self.stride_blocks, num_summary=self.num_summary_blocks)
        return HeadPattern(blocks=rule)
