"""`bigbird`: the first blocks, a window of blocks, and random blocks between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_not_negative, require_positive
from sparse_hf_kernels import BlockRule, HeadPattern

_MASK = 2**32 - 1


def _mixed(x: Any) -> Any:
    """MurmurHash3's 32-bit finalizer, on a Python integer or an int64 tensor of values in [0, 2^32)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


@dataclass(frozen=True, kw_only=True)
class BigBirdRule(BlockRule):
    """One head's blocks; `key` in [0, 2^32) picks its random ones."""

    block_size: int
    num_global_blocks: int
    num_window_blocks: int
    num_random_blocks: int
    key: int

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        keep = (k_blocks < self.num_global_blocks) | (q_blocks - k_blocks < self.num_window_blocks)
        for chosen in self.random_blocks(q_blocks):
            keep = keep | (k_blocks == chosen)
        return keep & (k_blocks <= q_blocks)

    def random_blocks(self, q_blocks: Tensor) -> list[Tensor]:
        """`num_random_blocks` tensors like `q_blocks`: distinct blocks behind the global and before the window ones.

        A row with fewer such blocks has them all, and -1 for the rest. Integers only: every device draws the same.
        """
        first = self.num_global_blocks
        count = q_blocks - self.num_window_blocks + 1 - first  # candidates of each row
        state = _mixed((self.key + q_blocks * 0x9E3779B9) & _MASK)
        chosen: list[Tensor] = []
        # Floyd's sampling without replacement: the t-th draw among one candidate more than the draw before.
        for draw in range(self.num_random_blocks):
            top = count - self.num_random_blocks + draw
            drawn = (_mixed(state ^ _mixed(draw + 1)) * (top + 1).clamp_min(0)) >> 32
            for earlier in chosen:
                drawn = drawn.where(drawn + first != earlier, top)
            chosen.append((drawn + first).masked_fill(top < 0, -1))
        return chosen


@dataclass(frozen=True, kw_only=True)
class BigBird(Method):
    """The causal port of BigBird-ITC, exact to blocks and causal inside the diagonal one.

    A block of queries reads the first blocks, itself and the blocks before it, and random ones of those between. Which
    is a function of seed, layer, KV head and the query block's number alone: the same in training, prefill and
    decoding, on every device and at every length.

    Args:
        block_size: tokens per block, 64 or 128 for the fused kernels.
        num_global_blocks: first blocks that all read.
        num_window_blocks: the own block and those before it; 2 is the causal half of the paper's 3.
        num_random_blocks: drawn without replacement; a row with fewer blocks to draw from has them all.
        seed: another one draws other blocks.
    """

    name: ClassVar[str] = "bigbird"
    summary: ClassVar[str] = "first blocks, a window of blocks, random blocks that differ by layer and head"
    source: ClassVar[str] = "BigBird, arXiv 2007.14062, section 2 and appendix D (causal port)"

    block_size: int = 64
    num_global_blocks: int = 1
    num_window_blocks: int = 2
    num_random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "block_size", "num_window_blocks")
        require_not_negative(self, "num_global_blocks", "num_random_blocks", "seed")

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        key = 0
        for number in (self.seed, place.layer, place.kv_head):
            key = _mixed((key + number + 0x9E3779B9) & _MASK)
        rule = BigBirdRule(
            block_size=self.block_size,
            num_global_blocks=self.num_global_blocks,
            num_window_blocks=self.num_window_blocks,
            num_random_blocks=self.num_random_blocks,
            key=key,
        )
        return HeadPattern(blocks=rule)
