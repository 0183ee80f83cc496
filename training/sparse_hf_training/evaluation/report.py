"""`LabReport`: a sparse variant beside dense, on the same samples: what it costs, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_hf.figures import Figure, replace_json
from sparse_hf_training.evaluation.cells import read_json
from sparse_hf_training.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    mcnemar_p,
    paired_difference_interval,
    wilson_interval,
)
from sparse_hf_training.evaluation.variant import TaskOutcome, VariantResult

REPORT_FILE = "report.json"
MIN_DENSE = 0.5
"""A task that the dense model answers less often than this says nothing about sparsity."""


def folder_beside(artefact: Path) -> Path:
    """Where the evaluation of an artefact lies, whose own folder holds nothing else."""
    whole = artefact.resolve()
    # "." has no name of its own.
    return (artefact if artefact.name else whole).with_name(f"{whole.name}-evaluation")


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """One task, dense and sparse on the same samples.

    Args:
        dense, sparse: the outcomes.
        p_value: of McNemar's exact test.
        p_holm: the same, corrected for the number of tasks that are judged.
        failed_by_dense: the dense model itself fails the task; it is set apart.
    """

    dense: TaskOutcome
    sparse: TaskOutcome
    p_value: float
    p_holm: float
    failed_by_dense: bool

    @property
    def task(self) -> str:
        return self.dense.task

    @property
    def difference(self) -> float:
        """Sparse minus dense."""
        return self.sparse.share - self.dense.share

    @property
    def interval(self) -> Interval:
        """95% interval of the difference, paired."""
        return paired_difference_interval(self.sparse.exact, self.dense.exact)

    @property
    def answer_losses(self) -> tuple[float, float]:
        """Nats per answer token, dense and sparse, on the samples that both have."""
        pairs = zip(self.dense.answer_losses, self.sparse.answer_losses, strict=True)
        dense, sparse = zip(*pairs, strict=True)
        return sum(dense) / len(dense), sum(sparse) / len(sparse)

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: {"share": outcome.share, "interval": wilson_interval(outcome.num_exact, len(outcome.exact))}
            for name, outcome in (("dense", self.dense), ("sparse", self.sparse))
        }
        return {
            "task": self.task,
            "num_samples": len(self.dense.exact),
            **rows,
            "difference": self.difference,
            "interval": self.interval,
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "failed_by_dense": self.failed_by_dense,
            "answer_loss": dict(zip(("dense", "sparse"), self.answer_losses, strict=True)),
        }


@dataclass(frozen=True, kw_only=True)
class LabReport:
    """What one evaluation found.

    Args:
        name: what tables and plots call the sparse variant.
        about: JSON-plain facts that say what was measured: artefact, base model, head sparsity, methods.
        settings: of the measurement.
        dense, sparse: the cells.
        min_dense: dense share below which a task is set apart.
    """

    name: str
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    dense: VariantResult
    sparse: VariantResult
    min_dense: float = MIN_DENSE

    @property
    def comparisons(self) -> tuple[TaskComparison, ...]:
        """Worst task first; those that dense itself fails come last."""
        pairs = list(zip(self.dense.tasks, self.sparse.tasks, strict=True))
        failed = [dense.share < self.min_dense for dense, _ in pairs]
        p_values = [mcnemar_p(sparse.exact, dense.exact) for dense, sparse in pairs]
        judged = [n for n in range(len(pairs)) if not failed[n]]
        corrected = dict(zip(judged, holm([p_values[n] for n in judged]), strict=True))
        found = [
            TaskComparison(
                dense=dense,
                sparse=sparse,
                p_value=p_values[n],
                p_holm=corrected.get(n, p_values[n]),
                failed_by_dense=failed[n],
            )
            for n, (dense, sparse) in enumerate(pairs)
        ]
        return tuple(sorted(found, key=lambda each: (each.failed_by_dense, each.difference, each.sparse.share)))

    @property
    def judged(self) -> tuple[TaskComparison, ...]:
        """The tasks that the dense model can do, worst first."""
        return tuple(each for each in self.comparisons if not each.failed_by_dense)

    @property
    def failed_by_dense(self) -> tuple[TaskComparison, ...]:
        return tuple(each for each in self.comparisons if each.failed_by_dense)

    @property
    def worst(self) -> TaskComparison | None:
        """The task that loses most, or None where the dense model can do none."""
        return next(iter(self.judged), None)

    @property
    def mean_share(self) -> float:
        """Mean exact match of the sparse variant over the tasks that the dense model can do; NaN without one."""
        shares = [each.sparse.share for each in self.judged]
        return sum(shares) / len(shares) if shares else float("nan")

    @property
    def loss_increase(self) -> tuple[float, Interval]:
        """Relative increase of the loss on held text, and its 95% interval: a bootstrap over rows, paired."""
        base = self.dense.text.mean
        changes = [(s - d) / base for d, s in zip(self.dense.text.rows, self.sparse.text.rows, strict=True)]
        return sum(changes) / len(changes), bootstrap_interval(changes)

    @property
    def kv_share(self) -> float:
        """Bytes of keys and values held at the end, of dense."""
        return self.sparse.footprint.held / self.dense.footprint.held

    @property
    def footprint_share(self) -> float:
        """Bytes held, summed over time, of dense."""
        return self.sparse.footprint.byte_tokens / self.dense.footprint.byte_tokens

    def summary(self) -> dict[str, Any]:
        """The report without its samples, JSON-plain."""
        increase, interval = self.loss_increase
        worst = self.worst
        return {
            "name": self.name,
            "about": dict(self.about),
            "settings": dict(self.settings),
            "worst_task": None if worst is None else worst.task,
            "tasks": [each.to_dict() for each in self.judged],
            "failed_by_dense": [each.to_dict() for each in self.failed_by_dense],
            "text_loss": {
                "dense": self.dense.text.mean,
                "sparse": self.sparse.text.mean,
                "increase": increase,
                "interval": interval,
            },
            "kv_bytes": {
                name: {"held": result.footprint.held, "peak": result.footprint.peak, "at_tokens": _last(result)}
                for name, result in (("dense", self.dense), ("sparse", self.sparse))
            },
            "kv_share": self.kv_share,
            "footprint_share": self.footprint_share,
            "density": {
                "prefill": self.sparse.footprint.prefill_density,
                "decode": self.sparse.footprint.decode_density,
            },
            "device_peak": {"dense": self.dense.footprint.device_peak, "sparse": self.sparse.footprint.device_peak},
        }

    def figures(self) -> list[Figure]:
        """The summary in the project's schema, each task with the ends of its intervals."""
        length = self.settings["seq_len"]
        found: list[Figure] = []

        def add(case: str, value: float, unit: str, lower: bool, baseline: float | None = None) -> None:
            found.append(Figure(case=case, value=value, unit=unit, lower_is_better=lower, baseline=baseline))

        for each in self.comparisons:
            apart = ", which dense itself fails" if each.failed_by_dense else ""
            case = f"recall {each.task}, {length} tokens, {len(each.sparse.exact)} samples{apart}"
            add(case, each.sparse.share, "share", False, each.dense.share)
            low, high = wilson_interval(each.sparse.num_exact, len(each.sparse.exact))
            add(f"{case} (95% low)", low, "share", False)
            add(f"{case} (95% high)", high, "share", False)
        add("loss on held text", self.sparse.text.mean, "nats/token", True, self.dense.text.mean)
        kv, dense = self.sparse.footprint, self.dense.footprint
        add(f"KV cache at {_last(self.sparse)} tokens", kv.held, "bytes", True, dense.held)
        add("KV cache, peak", kv.peak, "bytes", True, dense.peak)
        add("KV footprint over time", 100 * self.footprint_share, "%", True, 100.0)
        add("density of prefill", 100 * kv.prefill_density, "%", True, 100.0)
        add("density of decoding", 100 * kv.decode_density, "%", True, 100.0)
        return found

    def save(self, folder: Path) -> Path:
        """Writes `report.json`, with every sample's outcome, whole or not at all."""
        value = {
            "name": self.name,
            "about": dict(self.about),
            "settings": dict(self.settings),
            "min_dense": self.min_dense,
            "dense": self.dense.to_dict(),
            "sparse": self.sparse.to_dict(),
        }
        replace_json(folder / REPORT_FILE, value)
        return folder / REPORT_FILE

    @classmethod
    def load(cls, path: str | Path) -> LabReport:
        """From a report's file or a folder that holds one, an evaluation's or a run's; an artefact's lies beside it.

        Raises:
            ValueError: if there is none, or it is no report.
        """
        path = Path(path)
        folders = (path, path / "evaluation", folder_beside(path))
        places = (path, *(folder / REPORT_FILE for folder in folders))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ValueError(f"{path} holds no {REPORT_FILE}; `sparse-hf eval {path}` makes one")
        values = read_json(found)
        try:
            return cls(**{**values, **{name: VariantResult.from_dict(values[name]) for name in ("dense", "sparse")}})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{found} is no report of sparse-hf eval ({error}); run it again") from error


def _last(result: VariantResult) -> int:
    return result.footprint.tokens[-1]
