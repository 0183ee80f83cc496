"""A stream beside the one that computes, for copies from and to host memory. Without CUDA there is none: copies run
where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


class SideStream:
    """Of one device; see `side_stream`. What "current" says is the stream that the caller computes in."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_current(self) -> Iterator[None]:
        """Within, work goes to this stream; it begins once the current one has done what it was given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What the current stream is given from now on waits for all that this one was given."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def settle(self) -> None:
        """The host waits, after which it may read and write what copies read and wrote."""
        if self.stream is not None:
            self.stream.synchronize()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Within `after_current`: a copy that the host does not wait for."""
        target.copy_(source, non_blocking=self.stream is not None)

    def share(self, x: Tensor) -> Tensor:
        """x, whose memory is not given to others before copies that were asked for are done."""
        if self.stream is not None:
            x.record_stream(self.stream)
        return x


@lru_cache
def side_stream(device: torch.device) -> SideStream:
    """One for all caches of a device, which share the same way to the host."""
    return SideStream(device)
