"""Times of methods on all heads over that of dense attention, side by side at one length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparse_hf.bench.contenders import Call, Contender, DynamicHF, SparseHF
from sparse_hf.bench.session import Entry, Session
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


def method_layout(method: Method, num_kv_heads: int, num_dense_rows: int) -> AttentionLayout:
    """The method on every head."""
    config = SparseConfig(sparse=method, min_seq_len=num_dense_rows)
    return head_layout([method] * num_kv_heads, config, UNBOUNDED)


def dense_len(method: Method, num_kv_heads: int, num_dense_rows: int = 0) -> int:
    """Sequences of up to so many tokens are dense as a whole."""
    if isinstance(method, DynamicMethod):
        return max(num_dense_rows, 2 * method.block_size)
    return method_layout(method, num_kv_heads, num_dense_rows).dense_len


def time_ratios(session: Session, shape: Shape, jobs: Mapping[str, Job]) -> dict[str, float]:
    """Time of each job's forward, what it selects included, over that of the fastest dense one; by the jobs' labels.

    Measured twice where the host counts, and the worse counts: single calls with a cold cache, and calls in a row, host
    time included. Jobs that could not run are left out; the session's absences say why.

    Raises:
        ValueError: if every dense attention failed.
    """
    dense = AttentionLayout.dense(shape.num_kv_heads)
    rivals: list[Contender] = [session.ours(), *session.peers]
    against = [Entry(contender=contender, shape=shape, layout=dense) for contender in rivals]
    entries = {label: _entry(session, shape, label, job) for label, job in jobs.items()}
    worst: dict[str, float] = {}
    for clock in (session.clock, session.chain_clock):
        found = session.measure(CASE, [*entries.values(), *against], "forward", clock=clock)
        best = min((m.ms for m in found.values() if m.work == "dense"), default=None)
        if best is None:
            raise ValueError(f"no dense attention ran at {shape.seq_len} tokens ({_reasons(session)})")
        times = {m.work: m.ms for m in found.values() if m.work != "dense"}
        entries = {label: entry for label, entry in entries.items() if label in times}
        worst = {label: max(worst.get(label, 0.0), times[label] / best) for label in entries}
        if best >= HOST_COUNTS_BELOW_MS:
            break
    return worst


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
