"""Times of methods on all heads over that of dense attention, side by side at one length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from sparse_hf.bench.contenders import Call, Contender, DynamicHF, SparseHF
from sparse_hf.bench.session import Entry, Session
from sparse_hf.bench.timing import Sample
from sparse_hf.bench.workload import Shape
from sparse_hf.config import SparseConfig
from sparse_hf.dynamic import LayerHeads, attend_unpadded, without_selection
from sparse_hf.methods import DynamicMethod, Method
from sparse_hf.patching import head_layout
from sparse_hf_kernels import UNBOUNDED, AttentionLayout

CASE = "break-even"
HOST_COUNTS_BELOW_MS = 2.0
"""Where dense attention takes longer, the host is ahead of the device whatever a method asks of it."""

Job = tuple[Method, int]
"""A method on every head, and up to which position queries are dense."""


@dataclass(frozen=True, kw_only=True)
class ShortDynamicHF(DynamicHF):
    """A dynamic method at lengths where it chooses nothing, as a model calls it there; its layout is the dense one."""

    num_dense_rows: int

    @property
    def selected_blocks(self) -> None:  # type: ignore[override]
        return None

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return SparseHF.refuses(self, shape, layout)

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        heads = LayerHeads.of(
            method_layout(self.method, layout.num_kv_heads, self.num_dense_rows), (self.method,) * layout.num_kv_heads
        )
        scale = q.shape[-1] ** -0.5
        return Call(forward=lambda: attend_unpadded(q, k, v, heads, scale=scale)[0], inputs=(q, k, v))


@dataclass(frozen=True, kw_only=True)
class InLayer:
    """An attention with the matrix products of a decoder layer before it, those of a Llama with these heads.

    Args:
        attention: what comes after them.
        products: run them.
    """

    attention: Contender
    products: Callable[[], object]

    @property
    def name(self) -> str:
        return self.attention.name

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return self.attention.refuses(shape, layout)

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        call = self.attention.bind(q, k, v, layout)

        def forward() -> Tensor:
            self.products()
            return call.forward()

        return replace(call, forward=forward)


def layer_products(shape: Shape, device: torch.device) -> Callable[[], object]:
    """The products of one Llama layer over `seq_len` tokens: q, k, v and output projections, and an MLP of 3.5 times
    the hidden size, which is that of all heads.
    """
    hidden = shape.num_heads * shape.head_dim
    kv, inner = shape.num_kv_heads * shape.head_dim, 7 * hidden // 2
    options = {"dtype": shape.dtype, "device": device}
    narrow, wide = torch.randn(shape.seq_len, hidden, **options), torch.randn(shape.seq_len, inner, **options)  # type: ignore[call-overload]
    from_hidden = [torch.randn(hidden, out, **options) for out in (hidden, kv, kv, hidden, inner, inner)]  # type: ignore[call-overload]
    from_inner = torch.randn(inner, hidden, **options)  # type: ignore[call-overload]

    @torch.no_grad()
    def products() -> None:
        for weight in from_hidden:
            narrow @ weight
        wide @ from_inner

    return products


def method_layout(method: Method, num_kv_heads: int, num_dense_rows: int) -> AttentionLayout:
    """The method on every head."""
    config = SparseConfig(sparse=method, min_seq_len=num_dense_rows)
    return head_layout([method] * num_kv_heads, config, UNBOUNDED)


def dense_len(method: Method, num_kv_heads: int, num_dense_rows: int = 0) -> int:
    """Sequences of up to so many tokens are dense as a whole."""
    if isinstance(method, DynamicMethod):
        return max(num_dense_rows, 2 * method.block_size)
    return method_layout(method, num_kv_heads, num_dense_rows).dense_len


def time_ratios(session: Session, shape: Shape, jobs: Mapping[str, Job], *, in_layer: bool = False) -> dict[str, float]:
    """Time of each job's forward, what it selects included, over that of the fastest dense one; by the jobs' labels.

    With `in_layer` both are times of a layer, the attention and the layer's matrix products.

    Measured twice where the host counts, and the worse counts: single calls with a cold cache, and calls in a row, host
    time included. Jobs that could not run are left out; the session's absences say why.

    Raises:
        ValueError: if every dense attention failed.
    """
    dense = AttentionLayout.dense(shape.num_kv_heads)
    rivals: list[Contender] = [session.ours(), *session.peers]
    against = [Entry(contender=contender, shape=shape, layout=dense) for contender in rivals]
    entries = {label: _entry(session, shape, label, job) for label, job in jobs.items()}
    if in_layer:
        products = layer_products(shape, session.device)
        against = [_in_layer(entry, products) for entry in against]
        entries = {label: _in_layer(entry, products) for label, entry in entries.items()}
    worst: dict[str, float] = {}
    for clock in (session.clock, session.chain_clock):
        found = session.measure(CASE, [*entries.values(), *against], "forward", clock=clock)
        best = min((m for m in found.values() if m.work == "dense"), key=lambda m: m.ms, default=None)
        if best is None:
            raise ValueError(f"no dense attention ran at {shape.seq_len} tokens ({_reasons(session)})")
        ratios = {m.work: _paired(m.sample, best.sample) for m in found.values() if m.work != "dense"}
        entries = {label: entry for label, entry in entries.items() if label in ratios}
        worst = {label: max(worst.get(label, 0.0), ratios[label]) for label in entries}
        if best.ms >= HOST_COUNTS_BELOW_MS:
            break
    return worst


def _paired(ours: Sample, dense: Sample) -> float:
    """The median over rounds of both times' ratio: a clock that sinks under load is the same for both in a round."""
    return median(a / b for a, b in zip(ours.times_ms, dense.times_ms, strict=True))


def _in_layer(entry: Entry, products: Callable[[], object]) -> Entry:
    return replace(entry, contender=InLayer(attention=entry.contender, products=products))


def _entry(session: Session, shape: Shape, label: str, job: Job) -> Entry:
    method, num_dense_rows = job
    layout = method_layout(method, shape.num_kv_heads, num_dense_rows)
    contender = session.ours()
    if isinstance(method, DynamicMethod):
        if shape.seq_len > dense_len(method, shape.num_kv_heads, num_dense_rows):
            contender = DynamicHF(method=method, device=session.device.type)
        else:
            device = session.device.type
            contender = ShortDynamicHF(method=method, device=device, num_dense_rows=num_dense_rows)
            layout = without_selection(layout)
    return Entry(contender=contender, shape=shape, layout=layout, work=label)


def _reasons(session: Session) -> str:
    said = "; ".join(f"{absence.contender}: {absence.reason}" for absence in session.absences[-3:])
    return f"{said}; `sparse-hf env` shows why" if said else "`sparse-hf env` shows why"
