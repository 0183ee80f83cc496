"""`dilated`: blocks at distances that double, or LongNet's segments with rates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_not_negative, require_positive
from sparse_hf_kernels import BlockRule, HeadPattern


@dataclass(frozen=True, kw_only=True)
class DilatedRule(BlockRule):
    """One head's blocks; `phases` are what block numbers leave modulo `rates`, in the segments of a LongNet form."""

    block_size: int
    num_window_blocks: int
    num_sink_blocks: int
    segments: tuple[int, ...] = ()
    rates: tuple[int, ...] = ()
    phases: tuple[int, ...] = ()

    def keeps(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        distance = q_blocks - k_blocks
        keep = (distance < self.num_window_blocks) | (k_blocks < self.num_sink_blocks)
        if not self.segments:
            keep = keep | (distance & (distance - 1) == 0)  # 0 and the powers of two
        for segment, rate, phase in zip(self.segments, self.rates, self.phases, strict=True):
            same = q_blocks // segment == k_blocks // segment
            in_phase = (q_blocks % segment % rate == phase) & (k_blocks % segment % rate == phase)
            keep = keep | (same & in_phase)
        return keep & (distance >= 0)


@dataclass(frozen=True, kw_only=True)
class Dilated(Method):
    """Block offsets 0, 1, 2, 4, 8, ... with a window and sinks; exact to blocks, causal inside the diagonal one.

    With `segments` and `rates`, LongNet's form instead of the offsets: of each segment of w_k blocks, those whose
    number in the segment is h mod r_k (h the KV head) modulo r_k read each other. A key that several segments give
    counts once; beyond the last segment only window and sinks are read.

    Args:
        block_size: tokens per block, 64 or 128 for the fused kernels.
        num_window_blocks: the own block and those before it.
        num_sink_blocks: first blocks that all read.
        segments: LongNet's w_k in blocks, rising; empty for the doubling offsets.
        rates: LongNet's r_k, one per segment, none above its segment.
    """

    name: ClassVar[str] = "dilated"
    summary: ClassVar[str] = "blocks at distances 0, 1, 2, 4, 8, ..., or LongNet's segments and rates"
    source: ClassVar[str] = (
        "LogSparse, arXiv 1907.00235, section 4.2, by blocks; LongNet, arXiv 2307.02486, section 2.2"
    )

    block_size: int = 64
    num_window_blocks: int = 1
    num_sink_blocks: int = 0
    segments: tuple[int, ...] = ()
    rates: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("segments", "rates"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ValueError(f"dilated: {name} must be a list of integers, got {values!r}")
            object.__setattr__(self, name, tuple(values))  # JSON and YAML give lists
        require_positive(self, "block_size", "num_window_blocks")
        require_not_negative(self, "num_sink_blocks")
        if len(self.segments) != len(self.rates):
            raise ValueError(
                f"dilated: segments and rates go in pairs, got {len(self.segments)} and {len(self.rates)} of them"
            )
        numbers = (*self.segments, *self.rates)
        if any(not isinstance(number, int) or isinstance(number, bool) or number <= 0 for number in numbers):
            raise ValueError(
                f"dilated: segments and rates must be positive integers, got {self.segments}, {self.rates}"
            )
        if any(a >= b for a, b in pairwise(self.segments)) or any(map(int.__gt__, self.rates, self.segments)):
            raise ValueError(
                f"dilated: segments must rise and no rate exceed its segment, got {self.segments} and {self.rates}"
            )

    @classmethod
    def longnet(cls, *, num_levels: int = 5, first_segment: int = 32, growth: int = 2, block_size: int = 64) -> Dilated:
        """LongNet's geometric sequences: segments of `first_segment * growth^k` blocks at rates `growth^k`.

        The longest segment, `first_segment * growth^(num_levels - 1)` blocks, should cover the longest sequence. By
        default segments go from 2048 to 32768 tokens, as in the paper.

        Raises:
            ValueError: for numbers that are not positive, or a growth below 2.
        """
        if num_levels <= 0 or first_segment <= 0 or growth < 2:
            raise ValueError(
                f"longnet wants num_levels >= 1, first_segment >= 1 and growth >= 2, "
                f"got {num_levels}, {first_segment} and {growth}"
            )
        powers = [growth**level for level in range(num_levels)]
        return cls(
            block_size=block_size,
            segments=tuple(first_segment * power for power in powers),
            rates=tuple(powers),
        )

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        rule = DilatedRule(
            block_size=self.block_size,
            num_window_blocks=self.num_window_blocks,
            num_sink_blocks=self.num_sink_blocks,
            segments=self.segments,
            rates=self.rates,
            phases=tuple(place.kv_head % rate for rate in self.rates),
        )
        return HeadPattern(blocks=rule)
