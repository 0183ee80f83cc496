"""One run: measures groups of contenders side by side, and keeps what was measured and what could not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_hf.bench.check import WrongResultError, check_backward, check_forward
from sparse_hf.bench.contenders import Call, Contender, MixedHF, SparseHF
from sparse_hf.bench.timing import MIN_ROUNDS, Clock, Sample, alternate
from sparse_hf.bench.workload import Direction, Shape, density, make_inputs, selected_density, useful_flops
from sparse_hf_kernels import AttentionLayout, TokenPositions
from sparse_hf_kernels.mixed_attention import mixed_attention_reference
from sparse_hf_kernels.sparse_attention import sparse_attention_reference


class DeviceLostError(Exception):
    """A kernel broke the device for this process."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a group.

    Args:
        contender: who computes.
        shape, layout: what is computed.
        work: entries of one group with equal `work` are compared with each other.
        check: the problem that its backward is checked on; a forward is checked on the timed problem itself.
    """

    contender: Contender
    shape: Shape
    layout: AttentionLayout
    work: str = "dense"
    check: tuple[Shape, AttentionLayout] | None = None

    @property
    def label(self) -> str:
        return f"{self.contender.name}, {self.work}"

    @property
    def is_ours(self) -> bool:
        return isinstance(self.contender, SparseHF)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One timed entry. `relative_error` and `peak_mib` belong to the same call.

    `peak_mib` is the memory beyond the inputs, with what a peer keeps from call to call (`Call.held_bytes`).
    """

    case: str
    contender: str
    work: str
    is_ours: bool
    direction: Direction
    backend: str
    shape: Shape
    density: float
    flops: float
    sample: Sample
    relative_error: float | None
    peak_mib: float | None

    @property
    def ms(self) -> float:
        return self.sample.median

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s of the median."""
        return self.flops / self.ms / 1e9


@dataclass(frozen=True, kw_only=True)
class Other:
    """A timed call that is no attention."""

    case: str
    label: str
    shape: Shape | None
    sample: Sample


@dataclass(frozen=True, kw_only=True)
class Absence:
    """What a case lacks, and why; `failed` if it is the project's own and raised or was wrong."""

    case: str
    contender: str
    reason: str
    failed: bool = False


@dataclass(kw_only=True)
class Session:
    """Measures and collects.

    Args:
        device: where everything runs.
        clock: for single calls.
        chain_clock: for calls in a row, host time included.
        peers: whom to compare with.
        budget_ms: measuring time per contender.
        min_rounds: at least so many calls of each, whatever they take.
        matmul_size: of the product that stands for the ceiling.
        inputs: makes q, k and v of a shape, leaves; the same ones each time.
    """

    device: torch.device
    clock: Clock
    chain_clock: Clock
    peers: Sequence[Contender]
    budget_ms: float
    min_rounds: int = MIN_ROUNDS
    matmul_size: int = 8192
    inputs: Callable[[Shape, torch.device], tuple[Tensor, Tensor, Tensor]] = make_inputs
    measurements: list[Measurement] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    matmul_tflops: float | None = None

    def ours(self, backend: str | None = None) -> SparseHF:
        return SparseHF(backend=backend, device=self.device.type)

    def mixed(self) -> MixedHF:
        return MixedHF(device=self.device.type)

    def peer_entries(self, shape: Shape, layout: AttentionLayout, work: str = "dense") -> list[Entry]:
        return [Entry(contender=peer, shape=shape, layout=layout, work=work) for peer in self.peers]

    def measure(
        self, case: str, entries: Sequence[Entry], direction: Direction, *, clock: Clock | None = None
    ) -> dict[str, Measurement]:
        """Checks and times entries in turns: measurements by label. Who cannot take part is kept with the reason.

        Raises:
            DeviceLostError: if the device no longer answers.
        """
        inputs: dict[Shape, tuple[Tensor, Tensor, Tensor]] = {}
        runs: dict[str, Callable[[], object]] = {}
        ready: dict[str, tuple[Entry, float | None, float | None, float | None]] = {}
        for entry in entries:
            try:
                if reason := entry.contender.refuses(entry.shape, entry.layout):
                    self.miss(case, entry.label, reason)
                    continue
                if entry.shape not in inputs:
                    inputs[entry.shape] = self.inputs(entry.shape, self.device)
                error = self._check(entry, inputs[entry.shape], direction)
                call = entry.contender.bind(*inputs[entry.shape], entry.layout)
                run = timed_call(call, direction)
                peak = self._warm_up(run)
                peak = None if peak is None else peak + call.held_bytes / 2**20
                kept = None if call.selection is None else selected_density(call.selection, entry.shape.seq_len)
            except Exception as failure:
                where = f"{entry.label}, {entry.shape.seq_len} tokens"
                self.failed(case, where, failure, ours=entry.is_ours)
                continue
            runs[entry.label] = run
            ready[entry.label] = (entry, error, peak, kept)
        found = {}
        clock = clock or self.clock
        samples = alternate(runs, clock, budget_ms=self.budget_ms, min_rounds=self.min_rounds)
        for label, sample in samples.items():
            entry, error, peak, kept = ready[label]
            found[label] = self._measurement(case, entry, direction, sample, error, peak, kept)
        self.measurements += found.values()
        runs.clear()
        inputs.clear()
        self.free()
        return found

    def time(self, case: str, shape: Shape | None, calls: Mapping[str, Callable[[], object]]) -> dict[str, Sample]:
        """Times calls that are no attention. What fails is kept with the reason."""
        runs = {label: call for label, call in calls.items() if self.attempt(case, label, call)}
        samples = alternate(runs, self.clock, budget_ms=self.budget_ms, min_rounds=self.min_rounds)
        self.others += [Other(case=case, label=label, shape=shape, sample=sample) for label, sample in samples.items()]
        self.free()
        return samples

    def attempt(self, case: str, label: str, call: Callable[[], object]) -> bool:
        """Runs a call once; False, with the reason kept, if it fails."""
        try:
            self._warm_up(call)
        except Exception as failure:
            self.failed(case, label, failure)
            return False
        return True

    def miss(self, case: str, contender: str, reason: str, *, failed: bool = False) -> None:
        """Notes that a contender is absent, and why; once per reason."""
        absence = Absence(case=case, contender=contender, reason=reason, failed=failed)
        if absence not in self.absences:
            self.absences.append(absence)

    def failed(self, case: str, contender: str, failure: Exception, *, ours: bool = True) -> None:
        """Notes what was raised.

        Raises:
            DeviceLostError: if the device no longer answers, so that nothing can be measured any more.
        """
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        said = " ".join(lines[:3])[:300]
        if not isinstance(failure, WrongResultError):
            said = f"{type(failure).__name__}: {said}"
        self.miss(case, contender, said, failed=ours)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                self.free()
            except Exception as lost:
                raise DeviceLostError(f"{contender} left the device unusable in {case}: {said}") from lost

    def free(self) -> None:
        """Hands memory back, so that one case cannot starve the next."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, entry: Entry, inputs: tuple[Tensor, Tensor, Tensor], direction: Direction) -> float | None:
        if direction == "forward":
            return check_forward(entry.contender.bind(*inputs, entry.layout), inputs, entry.layout)
        if entry.check is None:
            return None
        shape, layout = entry.check
        small = make_inputs(shape, self.device, seed=1)
        return check_backward(
            entry.contender.bind(*small, layout), reference_call(small, layout, entry.contender), shape.dtype
        )

    def _warm_up(self, call: Callable[[], object]) -> float | None:
        """Runs it once, so that it compiles: the memory that it took, in MiB, or None on a CPU."""
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def _measurement(
        self,
        case: str,
        entry: Entry,
        direction: Direction,
        sample: Sample,
        error: float | None,
        peak: float | None,
        kept: float | None,
    ) -> Measurement:
        contender, shape = entry.contender, entry.shape
        # The two-branch operator's work is that of its dense branch, which holds the other; that of a selection is a
        # share of it.
        of_dense = kept is not None or isinstance(contender, MixedHF)
        layout = AttentionLayout.dense(shape.num_kv_heads) if of_dense else entry.layout
        return Measurement(
            case=case,
            contender=contender.name,
            work=entry.work,
            is_ours=entry.is_ours,
            direction=direction,
            backend=contender.chosen_backend(shape, entry.layout) if isinstance(contender, SparseHF) else "",
            shape=shape,
            density=density(layout, shape.seq_len) if kept is None else kept,
            flops=useful_flops(shape, layout, direction) * (1 if kept is None else kept),
            sample=sample,
            relative_error=error,
            peak_mib=peak,
        )


def reference_call(inputs: tuple[Tensor, Tensor, Tensor], layout: AttentionLayout, contender: Contender) -> Call:
    """The fp32 reference of what the contender computes, on the same values."""
    leaves = tuple(x.detach().float().requires_grad_() for x in inputs)
    q, k, v = leaves
    positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device)
    scale = q.shape[-1] ** -0.5
    if not isinstance(contender, MixedHF):
        return Call(
            forward=lambda: sparse_attention_reference(q, k, v, layout, positions=positions, scale=scale)[0],
            inputs=leaves,
        )
    full, gate = AttentionLayout.dense(layout.num_kv_heads), contender.gates(layout.num_kv_heads, q.device)
    return Call(
        forward=lambda: mixed_attention_reference(
            q, k, v, gate, full, layout, positions=positions, scale=scale, skip_saturated=False
        ),
        inputs=(*leaves, gate),
    )


def timed_call(call: Call, direction: Direction) -> Callable[[], object]:
    """What one measurement runs. A backward differentiates one kept graph again and again."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return call.forward()

        return forward
    kept = call.forward()
    upstream = torch.randn_like(kept)
    if direction == "backward":
        return lambda: torch.autograd.grad(kept, call.inputs, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(call.forward(), call.inputs, upstream)
