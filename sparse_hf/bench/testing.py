"""Stand-ins for clocks and peers, for tests of benchmarks on machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from sparse_hf.bench.contenders import Call
from sparse_hf.bench.workload import Shape
from sparse_hf_kernels import AttentionLayout, sparse_attention


class FakeClock:
    """Gives each label the milliseconds that `times` says, 1 by default, and runs nothing."""

    def __init__(self, times: Mapping[str, float] | None = None) -> None:
        self.times = dict(times or {})

    def record(self, label: str, call: Callable[[], object]) -> float:
        return self.times.get(label, 1.0)

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)


class FakePeer:
    """Attends with our own operator under a name; `factor` spoils its output."""

    def __init__(self, name: str, factor: float = 1.0) -> None:
        self.name, self.factor = name, factor

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return None

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        return Call(forward=lambda: sparse_attention(q, k, v, layout) * self.factor, inputs=(q, k, v))
