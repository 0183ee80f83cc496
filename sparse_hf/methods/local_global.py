"""`local_global`: some heads read a window, the others a window and evenly spaced blocks of the whole past."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import BlockRule, HeadPattern

ModelSize = Literal["small", "medium", "large"]
MAX_DENOMINATOR = 1024

# Start values, from no paper: (up to tokens, window_size, max_window_size, global_ratio), and heads by model size. The
# window grows with length, the share of global blocks falls, so that a global head's cost grows less than its length.
_BY_LENGTH = ((4096, 128, 512, 0.1), (32768, 256, 1024, 0.1), (131072, 512, 2048, 0.05))
_BEYOND = (1024, 4096, 0.02)
_HEADS: dict[ModelSize, tuple[int, int]] = {"small": (1, 1), "medium": (2, 1), "large": (3, 1)}


@dataclass(frozen=True, kw_only=True)
class LocalGlobalRule(BlockRule):
    """One head's blocks: an adaptive window, and `num_global` of every `of_blocks` blocks, evenly spaced."""

    block_size: int
    window_size: int
    min_window_size: int
    max_window_size: int
    num_global: int = 0
    of_blocks: int = 1

    @property
    def reach(self) -> int | None:  # type: ignore[override]
        return None if self.num_global else -(-self.max_window_size // self.block_size) * self.block_size

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        distance = q_blocks - k_blocks
        tokens, length = distance * self.block_size, (q_blocks + 1) * self.block_size
        # tokens < clamp(sqrt(window * length), min, max), in integers.
        adaptive = (tokens < self.min_window_size) | (tokens * tokens < self.window_size * length)
        keep = adaptive & (tokens < self.max_window_size)
        if self.num_global:
            keep = keep | (k_blocks * self.num_global % self.of_blocks < self.num_global)
        return keep & (distance >= 0)


@dataclass(frozen=True, kw_only=True)
class LocalGlobal(Method):
    """Of every `num_local_heads + num_global_heads` KV heads the first are local and the rest global.

    All of them read a window of W tokens, W = window_size * sqrt(n / window_size) within [min_window_size,
    max_window_size], where n counts the tokens up to the end of the query's own block. The usual form takes the whole
    sequence for n; then a token would read other keys as its sequence grows, and cached decoding could not equal
    prefill. Global heads read besides the blocks 0, 1 / global_ratio, 2 / global_ratio, ... Exact to blocks: a
    window is ceil(W / block_size) of them, the own one included.

    Args:
        block_size: tokens per block, 64 or 128 for the fused kernels.
        num_local_heads, num_global_heads: KV heads in each group, in this order.
        window_size: base of the window, in tokens: W at n = window_size.
        min_window_size, max_window_size: bounds of W, in tokens; equal ones fix it.
        global_ratio: share of blocks that global heads read, in (0, 1]; taken as a fraction with a denominator up to
            1024.
    """

    name: ClassVar[str] = "local_global"
    summary: ClassVar[str] = "local heads with a window that grows, global heads with evenly spaced blocks besides"
    source: ClassVar[str] = "heads of two kinds as in DuoAttention, arXiv 2410.10819; strides of arXiv 1904.10509"

    block_size: int = 64
    num_local_heads: int = 2
    num_global_heads: int = 1
    window_size: int = 128
    min_window_size: int = 32
    max_window_size: int = 512
    global_ratio: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "block_size", "num_local_heads", "num_global_heads")
        require_positive(self, "window_size", "min_window_size", "max_window_size")
        if self.min_window_size > self.max_window_size:
            raise ValueError(
                f"local_global: min_window_size must not exceed max_window_size, "
                f"got {self.min_window_size} and {self.max_window_size}"
            )
        if isinstance(self.global_ratio, bool) or not isinstance(self.global_ratio, (int, float)):
            raise ValueError(f"local_global: global_ratio must be a number, got {self.global_ratio!r}")
        if not 1 / MAX_DENOMINATOR <= self.global_ratio <= 1:
            raise ValueError(
                f"local_global: global_ratio must lie in [1/{MAX_DENOMINATOR}, 1], got {self.global_ratio}"
            )

    @classmethod
    def recommended(cls, seq_len: int, model_size: ModelSize = "medium") -> LocalGlobal:
        """Start values for sequences of up to `seq_len` tokens; measure them on your task.

        Args:
            seq_len: tokens.
            model_size: "small" (below 3 billion parameters), "medium" (below 30) or "large": larger models have more
                heads that do without the whole past.

        Raises:
            ValueError: for a length that is not positive or an unknown size.
        """
        if seq_len <= 0 or model_size not in get_args(ModelSize):
            raise ValueError(
                f"recommended wants a positive seq_len and one of {get_args(ModelSize)}, "
                f"got {seq_len} and {model_size!r}"
            )
        rows = (row for longest, *row in _BY_LENGTH if seq_len <= longest)
        window, largest, ratio = next(rows, _BEYOND)
        num_local, num_global = _HEADS[model_size]
        return cls(
            num_local_heads=num_local,
            num_global_heads=num_global,
            window_size=int(window),
            max_window_size=int(largest),
            global_ratio=ratio,
        )

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        is_global = place.kv_head % (self.num_local_heads + self.num_global_heads) >= self.num_local_heads
        share = Fraction(self.global_ratio).limit_denominator(MAX_DENOMINATOR) if is_global else Fraction(0)
        rule = LocalGlobalRule(
            block_size=self.block_size,
            window_size=self.window_size,
            min_window_size=self.min_window_size,
            max_window_size=self.max_window_size,
            num_global=share.numerator,
            of_blocks=share.denominator,
        )
        return HeadPattern(blocks=rule)
