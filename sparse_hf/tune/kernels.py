"""`tune_kernels`: which tile configuration of each kernel is fastest on this GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_hf.bench.check import MAX_RELATIVE_ERROR
from sparse_hf.bench.timing import Clock, alternate
from sparse_hf.tune.candidates import candidates, shipped
from sparse_hf.tune.plan import KernelOptions
from sparse_hf.tune.table import merge_entries, provenance
from sparse_hf.tune.workloads import Workload, make_workloads
from sparse_hf_kernels.tuned import SHIPPED, Config, Key, TunedTable, checked_entry, in_force

MIN_GAIN = 0.01
"""What a configuration must win over the shipped one, as the mean over the workloads; less is noise."""
MAX_LOSS = 0.02
"""What it may lose in a single workload."""

SkipReason = Literal["too large", "does not run", "wrong result"]
Progress = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A candidate that does not count, and why."""

    config: Config
    reason: SkipReason
    said: str


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The winner for a key.

    Args:
        config: the winner, the shipped configuration if nothing beats it.
        baseline: the shipped configuration.
        times_ms: winner's and baseline's median of each workload. For "dkdv" and "dq" that of a whole backward.
        num_tried: candidates besides the baseline, skipped ones included.
        skipped: candidates that do not count.
    """

    key: Key
    config: Config
    baseline: Config
    times_ms: dict[str, tuple[float, float]]
    num_tried: int
    skipped: tuple[Skip, ...]

    @property
    def ratio(self) -> float:
        """Time against the baseline, the geometric mean over the workloads."""
        return _mean_ratio([own / base for own, base in self.times_ms.values()])

    @property
    def skip_counts(self) -> dict[str, int]:
        return dict(Counter(skip.reason for skip in self.skipped))

    def entry(self) -> dict[str, Any]:
        """As the table's file has it."""
        key = self.key
        return {
            "backend": key.backend,
            "kind": key.kind,
            "arch": key.arch,
            "head_dim": key.head_dim,
            "dtype": str(key.dtype).removeprefix("torch."),
            "config": dict(self.config),
            "baseline": dict(self.baseline),
            "time_ms": sum(own for own, _ in self.times_ms.values()),
            "baseline_ms": sum(base for _, base in self.times_ms.values()),
            "workloads": {name: {"time_ms": x, "baseline_ms": y} for name, (x, y) in self.times_ms.items()},
            "skipped": self.skip_counts,
            **provenance(),
        }


def tune_kernels(
    keys: Sequence[Key],
    options: KernelOptions,
    device: torch.device,
    clock: Clock,
    *,
    progress: Progress = lambda text: None,
    make: Callable[..., list[Workload]] = make_workloads,
) -> Iterator[Tuned]:
    """The winner of each key, as soon as it is found.

    Args:
        keys: of `plan_kernels`.
        options: the workloads' sizes and the candidates' number.
        device: where they run.
        clock: what measures.
        progress: called with a line before each candidate.
        make: makes the workloads of a key.

    Raises:
        ValueError: as `tune_key`, or if a backend cannot serve a workload.
    """
    shape = dict(seq_len=options.tokens, num_heads=options.num_heads, num_kv_heads=options.num_kv_heads)
    for key in keys:
        with in_force(SHIPPED):  # a table of the user's would be its own baseline
            workloads = make(key, device, **shape)
        yield tune_key(
            key,
            workloads,
            candidates(key, quick=options.quick),
            shipped(key),
            clock,
            budget_ms=options.budget_ms,
            synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
            progress=progress,
        )
        del workloads
        if device.type == "cuda":
            torch.cuda.empty_cache()


def tune_key(
    key: Key,
    workloads: Sequence[Workload],
    configs: Sequence[Config],
    baseline: Config,
    clock: Clock,
    *,
    budget_ms: float,
    synchronize: Callable[[], object] = lambda: None,
    progress: Progress = lambda text: None,
) -> Tuned:
    """Tries each configuration on every workload, checks it against the baseline's output, times what is left.

    Raises:
        ValueError: if the baseline does not run, or a candidate breaks the device.
    """
    try:
        with in_force(_only(key, baseline)):
            expected = [workload.run() for workload in workloads]
            synchronize()
    except Exception as error:
        what = f"{key.backend} {key.kind}, head_dim {key.head_dim}"
        raise ValueError(
            f"the shipped configuration of {what} does not run here: {_said(error)}; `--quick` takes less memory"
        ) from error
    alive, skipped = [baseline], []
    for config in configs:
        progress(f"{key.backend} {key.kind} {key.head_dim}: {described(config)}")
        skip = _skip(key, config, workloads, expected, synchronize)
        if skip is None:
            alive.append(config)
        else:
            skipped.append(skip)
    del expected
    medians: dict[Config, dict[str, float]] = {config: {} for config in alive}
    for workload in workloads:
        calls = {described(config): partial(_run_with, _only(key, config), workload) for config in alive}
        samples = alternate(calls, clock, budget_ms=budget_ms)
        for config in alive:
            medians[config][workload.name] = samples[described(config)].median
    winner = choose(medians, baseline)
    return Tuned(
        key=key,
        config=winner,
        baseline=baseline,
        times_ms={name: (medians[winner][name], base) for name, base in medians[baseline].items()},
        num_tried=len(configs),
        skipped=tuple(skipped),
    )


def choose(medians: dict[Config, dict[str, float]], baseline: Config) -> Config:
    """The fastest in the geometric mean over workloads, if it gains `MIN_GAIN` and loses nowhere more than `MAX_LOSS`.

    Args:
        medians: milliseconds by configuration and workload.
        baseline: the one that stays unless another is faster.
    """
    best, best_ratio = baseline, 1 - MIN_GAIN
    for config, times in medians.items():
        ratios = [times[name] / base for name, base in medians[baseline].items()]
        if max(ratios) <= 1 + MAX_LOSS and (mean := _mean_ratio(ratios)) < best_ratio:
            best, best_ratio = config, mean
    return best


def described(config: Config) -> str:
    return ", ".join(f"{name} {value}" for name, value in config)


def row_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of a row, relative to the row's norm or to the median row's, whichever is larger.

    By rows, since a block that is missed changes one long row by much and the whole tensor by little.
    """
    expected = expected.float()
    norms = expected.norm(dim=-1)
    scale = norms.clamp_min(norms.median().clamp_min(1e-30))
    return ((actual.float() - expected).norm(dim=-1) / scale).max().item()


def write_kernel_table(path: Path, results: Sequence[Tuned]) -> None:
    """Writes the winners into a file that `SPARSE_HF_TUNED` can name, beside its entries for other keys.

    Raises:
        ValueError: if the file holds something else.
    """
    identity = ("backend", "kind", "arch", "head_dim", "dtype")
    merge_entries(path, [result.entry() for result in results], identity=identity, check=checked_entry)


def _skip(
    key: Key,
    config: Config,
    workloads: Sequence[Workload],
    expected: Sequence[tuple[Tensor, ...]],
    synchronize: Callable[[], object],
) -> Skip | None:
    """Runs a candidate once: why it does not count, or None."""
    limit = 2 * MAX_RELATIVE_ERROR[key.dtype]  # two results, each as far from the truth
    for workload, right in zip(workloads, expected, strict=True):
        try:
            result = _run_with(_only(key, config), workload)
            synchronize()
        except Exception as error:
            said = _said(error)
            try:
                synchronize()
            except Exception as lost:
                raise ValueError(
                    f"{described(config)} broke the device ({said}); start again with the other kinds or head sizes"
                ) from lost
            # Triton's name for a kernel that asks for more shared memory, registers or threads than there are.
            too_large = type(error).__name__ == "OutOfResources"
            return Skip(config=config, reason="too large" if too_large else "does not run", said=said)
        error_found = max(row_error(x, y) if x.numel() else 0.0 for x, y in zip(result, right, strict=True))
        if not error_found <= limit:
            said = f"{workload.name}: a row differs by {error_found:.1e}, more than {limit:.1e}"
            return Skip(config=config, reason="wrong result", said=said)
    return None


def _only(key: Key, config: Config) -> TunedTable:
    return TunedTable(source="candidate", configs={key: config})


def _run_with(table: TunedTable, workload: Workload) -> tuple[Tensor, ...]:
    with in_force(table):
        return workload.run()


def _mean_ratio(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"
