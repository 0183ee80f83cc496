"""Dense and sparse models side by side: every call once to see what it takes, then in turns against the best dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparse_hf.bench.end_to_end import DENSE, Models, ratios, within
from sparse_hf.bench.inference_plan import MIN_ROUNDS, Case, InferenceOptions, Where
from sparse_hf.bench.plan import Bound
from sparse_hf.bench.session import Other, Session
from sparse_hf.bench.timing import Clock, Sample, alternate
from sparse_hf.bench.workload import Shape
from sparse_hf.figures import Figure

BEST = "dense"
"""The dense model with the SDPA that was fastest in the first calls."""

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One first call: its time, what it returned, and the memory that it took beyond what was there before."""

    ms: float
    result: Any
    peak_bytes: int | None


@dataclass(kw_only=True)
class Run:
    """What the cases of a run share."""

    options: InferenceOptions
    session: Session
    models: Models

    def chosen(self, case: Case, where: Where) -> dict[str, Any]:
        """The sparse models of a case."""
        return {name: self.models.sparse[name] for name in self.options.chosen(case, where[1])}

    def dense_calls(self, call: Call) -> dict[str, Call]:
        """The call of the stock model with each SDPA; on a CPU torch has one to choose."""
        return {name: within(context, call) for name, context in dense_contexts(self.session.device).items()}

    def probe(self, case: Case, where: Where, calls: Mapping[str, Call]) -> dict[str, Probe]:
        """Every call once. What fails is kept with the reason, and counts as ours unless it is dense."""
        found = {}
        for label, call in calls.items():
            try:
                found[label] = self._first(call)
            except Exception as failure:
                self.session.failed(case, f"{label}, {described(where)}", failure, ours=not label.startswith(BEST))
            self.session.free()
        return found

    def compare(
        self, case: Case, where: Where, calls: Mapping[str, Call], *, clock: Clock | None = None
    ) -> tuple[dict[str, Sample], dict[str, Probe]]:
        """Times in turns of the sparse models and of the best dense call, as `BEST`; and all first calls."""
        probes = self.probe(case, where, calls)
        dense = [label for label in probes if label.startswith(BEST)]
        runs = {label: calls[label] for label in probes if label not in dense}
        if dense:
            runs = {BEST: calls[min(dense, key=lambda label: self._again(probes[label], calls[label]))], **runs}
        samples = alternate(
            runs,
            clock or self.session.clock,
            budget_ms=self.options.budget_ms,
            min_rounds=1 if self.options.quick else MIN_ROUNDS[case],
        )
        self.session.others += [
            Other(case=f"{case}, batch {where[1]}", label=label, shape=self._shape(where[0]), sample=sample)
            for label, sample in samples.items()
        ]
        self.session.free()
        return samples, probes

    def figure(self, case: str, where: Where, label: str, value: float, unit: str, **more: Any) -> Figure:
        return Figure(case=f"{case}, {described(where)}: {label}", value=value, unit=unit, **more)

    def time_figures(self, case: Case, where: Where, samples: Mapping[str, Sample], *, per: int = 1) -> list[Figure]:
        """Medians, each call's time shared by `per`."""
        return [
            self.figure(f"{case} time", where, label, sample.median / per, "ms", lower_is_better=True)
            for label, sample in samples.items()
        ]

    def speed_figure(self, case: Case, where: Where, label: str, num_tokens: int, sample: Sample) -> Figure:
        """Tokens per second where a call gives so many."""
        rate = 1000 * num_tokens / sample.median
        return self.figure(f"{case} speed", where, label, rate, "tokens/s", lower_is_better=False)

    def ratio_figures(
        self, case: Case, where: Where, samples: Mapping[str, Sample], *, lower_is_better: bool = False
    ) -> list[Figure]:
        """Medians over the rounds of dense time / sparse time, or the other way round where lower is better."""
        if BEST not in samples:
            return []
        found = []
        for label, sample in samples.items():
            if label != BEST:
                pair = (sample, samples[BEST]) if lower_is_better else (samples[BEST], sample)
                bound = self.options.bound(case, label, where)
                name = f"{case} over dense" if lower_is_better else f"{case} speed-up"
                value = float(np.median(ratios(*pair)))
                found.append(self.figure(name, where, label, value, "ratio", **bounds(bound, lower_is_better)))
        return found

    def _again(self, probe: Probe, call: Call) -> float:
        """The time of a call that ran once: of a second time where the first one may have been mostly loading."""
        return probe.ms if probe.ms > self.options.budget_ms else self._first(call).ms

    def _first(self, call: Call) -> Probe:
        cuda = self.session.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        taken = 1000 * (time.perf_counter() - start)
        return Probe(ms=taken, result=result, peak_bytes=torch.cuda.max_memory_allocated() - before if cuda else None)

    def _shape(self, num_tokens: int) -> Shape:
        options = self.options
        return Shape(
            seq_len=num_tokens,
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
            head_dim=options.head_dim,
            dtype=options.dtype,
        )


def dense_contexts(device: torch.device) -> Mapping[str, Callable[[], AbstractContextManager[Any]]]:
    """Each SDPA to try, by label."""
    if device.type != "cuda":
        return {BEST: nullcontext}
    return {name: context for name, context in DENSE.items() if name != BEST}


def described(where: Where) -> str:
    return f"{where[0]} tokens, batch {where[1]}"


def bounds(bound: Bound | None, lower_is_better: bool) -> dict[str, Any]:
    """The arguments of a figure that say what was asked for."""
    if bound is None:
        return {"lower_is_better": lower_is_better}
    return {"lower_is_better": lower_is_better, "must": bound.must, "goal": bound.goal}
