"""The target head sparsity and the gates' learning rate over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

ScheduleKind = Literal["linear", "logarithmic", "cubic"]
RateSchedule = Literal["constant", "cosine", "trapezoid"]
COSINE_RAMP, COSINE_FLOOR = 0.1, 0.01
TRAPEZOID_RAMP, TRAPEZOID_FLOOR = 0.2, 0.1


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """From `start` to `end` over the first `warmup_ratio` of the steps, then constant.

    Args:
        start, end: head sparsities in [0, 1).
        warmup_ratio: share of the steps, in [0, 1].
        kind: `linear`; `logarithmic` (log(1 - t) falls linearly, PruLong's); `cubic` (Zhu and Gupta, arXiv 1710.01878:
            fast first, slow at the end).
    """

    start: float = 0.0
    end: float = 0.5
    warmup_ratio: float = 0.6
    kind: ScheduleKind = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}_head_sparsity must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"sparsity_warmup_ratio must lie in [0, 1], got {self.warmup_ratio}")
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"schedule must be one of {get_args(ScheduleKind)}, got {self.kind!r}")

    def target(self, step: int, max_steps: int) -> float:
        """Head sparsity aimed at in step `step` of `max_steps`, counted from 0."""
        warmup = math.ceil(self.warmup_ratio * max_steps)
        progress = 1.0 if step >= warmup else step / warmup
        if self.kind == "logarithmic":
            return 1 - (1 - self.start) ** (1 - progress) * (1 - self.end) ** progress
        if self.kind == "cubic":
            return self.end + (self.start - self.end) * (1 - progress) ** 3
        return self.start + (self.end - self.start) * progress


def rate_factor(kind: RateSchedule, step: int, max_steps: int) -> float:
    """Factor on a learning rate in step `step` of `max_steps`, counted from 0.

    Args:
        kind: `constant`; `cosine`, PruLong's (its released scripts): from 0 up to 1 over the first tenth of the steps,
            then half a cosine down to 0.01; `trapezoid`, DuoAttention's (its released `train.py`): from 0.1 up to 1
            over the first fifth, down to 0.1 over the last.
    """
    if kind not in get_args(RateSchedule):
        raise ValueError(f"mask_rate_schedule must be one of {list(get_args(RateSchedule))}, got {kind!r}")
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        warmup = math.ceil(COSINE_RAMP * max_steps)
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, max_steps - warmup)
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
    ramp = max(1, math.floor(TRAPEZOID_RAMP * max_steps))
    return max(TRAPEZOID_FLOOR, min(1.0, (step + 1) / ramp, (max_steps - step) / ramp))
