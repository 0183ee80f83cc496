"""CUDA graphs: while one is captured nothing can be read from the device, so that positions stay data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_as_data: ContextVar[bool] = ContextVar("sparse_hf_positions_as_data", default=False)


@contextmanager
def positions_as_data() -> Iterator[None]:
    """Within, no call looks at what positions hold: padding and packing may differ in each replay of a captured graph.

    Warm up and capture within it, so that the warm-up loads the kernels that the graph needs. They visit every block
    with a mask: right, but sparsity and causality save no time. Prefill without padding and packing does not need it.
    """
    token = _as_data.set(True)
    try:
        yield
    finally:
        _as_data.reset(token)


def asked_as_data() -> bool:
    """Within `positions_as_data`."""
    return _as_data.get()


def may_read() -> bool:
    """Whether a call may wait for the device to learn what positions hold."""
    return not (asked_as_data() or is_capturing())


def is_capturing() -> bool:
    """The current CUDA stream is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
