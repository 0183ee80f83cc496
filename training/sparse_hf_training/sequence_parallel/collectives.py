"""The collectives of sequence parallelism: differentiable, traceable, labelled for profilers, and timed if asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the operators used below
from torch import Tensor

EXCHANGE_LABEL = "sparse_hf.exchange"
"""Name of the exchanges' ranges in `torch.profiler` traces, forward and backward."""


@dataclass
class ExchangeTimer:
    """What `time_exchanges` found.

    Args:
        calls: exchanges, forward and backward.
        bytes_sent: by this rank, what it keeps for itself included.
    """

    calls: int = 0
    bytes_sent: int = 0
    _host: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time in which the compute stream did nothing but wait for exchanges (waiting for late ranks included).

        Waits for the device.
        """
        if self._events:
            torch.cuda.synchronize()
        return self._host + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3


_timers: list[ExchangeTimer] = []


@contextmanager
def time_exchanges() -> Iterator[ExchangeTimer]:
    """Times the exchanges that run within, those of eager code; profilers see compiled ones too."""
    timer = ExchangeTimer()
    _timers.append(timer)
    try:
        yield timer
    finally:
        _timers.remove(timer)


@contextmanager
def _observed(x: Tensor) -> Iterator[None]:
    with torch.profiler.record_function(EXCHANGE_LABEL):
        if not _timers:
            yield
            return
        begun = time.perf_counter()
        events = None
        if x.is_cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        yield
        if events is not None:
            events[1].record()
        for timer in _timers:
            timer.calls += 1
            timer.bytes_sent += x.nbytes
            if events is None:
                timer._host += time.perf_counter() - begun
            else:
                timer._events.append(events)


def _observe(x: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if torch.compiler.is_compiling() else _observed(x)


class _AllToAll(torch.autograd.Function):
    """Part i of x `[size, ...]` goes to rank i; what comes from rank i stands at i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _exchange(x, size, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grads[0], ctx.size, ctx.name), None, None


def _exchange(x: Tensor, size: int, name: str) -> Tensor:
    x = x.contiguous()
    ones = [1] * size
    with _observe(x):
        found: Tensor = torch.ops._c10d_functional.all_to_all_single(x, ones, ones, name)
        found = torch.ops._c10d_functional.wait_tensor(found)
    return found


def all_to_all(x: Tensor, size: int, name: str) -> Tensor:
    """Sends `x[i]` to rank i of the group and returns what the ranks sent, `[size, ...]`; differentiable.

    Args:
        x: `[size, ...]`, of the same shape on all ranks.
        size, name: of the process group.
    """
    found: Tensor = _AllToAll.apply(x, size, name)
    return found


def all_gather(x: Tensor, size: int, name: str) -> Tensor:
    """The ranks' x `[...]` as `[size, ...]`; without a gradient."""
    with torch.no_grad():
        found: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, name)
        found = torch.ops._c10d_functional.wait_tensor(found)
    return found.unflatten(0, (size, -1))
