"""Time: quantiles of single calls, with contenders taking turns so that a power-limited clock favours none."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 30


@dataclass(frozen=True)
class Sample:
    """Milliseconds of repeated calls."""

    times_ms: tuple[float, ...]

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.times_ms, share))

    @property
    def median(self) -> float:
        return self.quantile(0.5)


class Clock(Protocol):
    """Records calls without waiting for them, and reads the times of all afterwards."""

    def record(self, label: str, call: Callable[[], object]) -> Any: ...

    def read(self, handles: Sequence[Any]) -> list[float]: ...


class CudaClock:
    """CUDA events around each call.

    Args:
        device: where the calls run.
        calls: calls between two events; their mean is the time. More than one shows what the host costs, too.
        flush: overwrite the L2 cache before each, which also hides how long the host takes to launch.
    """

    FLUSH_BYTES = 256 * 2**20  # an H200 has 60 MB

    def __init__(self, device: torch.device, *, calls: int = 1, flush: bool = True) -> None:
        self.calls = calls
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None

    def record(self, label: str, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self._flush is not None:
            self._flush.zero_()
        start.record()
        for _ in range(self.calls):
            call()
        end.record()
        return start, end

    def read(self, handles: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / self.calls for start, end in handles]


def alternate(
    calls: Mapping[str, Callable[[], object]], clock: Clock, *, budget_ms: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, Sample]:
    """Times all calls in rounds, every other round backwards.

    Args:
        calls: by label; each has run before, so that nothing compiles here.
        clock: what measures.
        budget_ms: time that a call may take on average; a round takes the time of all. At most `MAX_ROUNDS` rounds.
        min_rounds: at least so many, whatever they take.
    """
    if not calls:
        return {}
    labels = list(calls)
    with _what_is_there_stays():
        handles = {label: [clock.record(label, calls[label])] for label in labels}
        estimate = sum(time for label in labels for time in clock.read(handles[label]))
        wanted = math.ceil(budget_ms * len(labels) / max(estimate, 1e-6))
        for number in range(1, min(max(wanted, min_rounds), MAX_ROUNDS)):
            for label in labels if number % 2 == 0 else reversed(labels):
                handles[label].append(clock.record(label, calls[label]))
    return {label: Sample(tuple(clock.read(handles[label]))) for label in labels}


@contextmanager
def _what_is_there_stays() -> Iterator[None]:
    """Python's collector leaves alone what exists by now: to look through the many objects of models takes longer than
    many a call, and would fall to whichever is running. Garbage of the calls themselves is collected as ever."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
