"""Several reports side by side: which run keeps most for the bytes that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_hf_training.evaluation.report import LabReport
from sparse_hf_training.evaluation.statistics import Interval, wilson_interval

SAME = ("text", "seq_len", "num_samples", "seed", "num_rows")
"""Settings that must agree for runs to have answered the same samples."""


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """One run in the plane of what it holds and what it loses.

    Args:
        name: of the run.
        kv_share: bytes held at the end, of dense.
        recall: mean exact match over the tasks that dense can do in every run, with the interval of all samples.
        worst_task: the task that loses most, and how much with its interval.
        loss: relative increase of the loss on held text, with its interval.
        best_recall, best_loss: no other run has more recall, or less loss, for no more bytes.
    """

    name: str
    kv_bytes: int
    kv_share: float
    recall: tuple[float, Interval]
    worst_task: str
    worst: tuple[float, Interval]
    loss: tuple[float, Interval]
    best_recall: bool
    best_loss: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain; what there is no figure for is None."""
        return {name: _without_nan(value) for name, value in vars(self).items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_nan(each) for each in value]
    return None if value != value else value


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Reports, in the order in which they were given.

    Args:
        reports: one per run, names all different, all of the same samples.
    """

    reports: tuple[LabReport, ...]

    @classmethod
    def of(cls, reports: Sequence[LabReport]) -> Comparison:
        """Raises ValueError without reports, for two of one name, or for runs that answered other samples."""
        names = [report.name for report in reports]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"runs must be one or more of different names, got {names}; `sparse-hf eval --name` gives one"
            )
        for report in reports[1:]:
            pairs = [(key, reports[0].settings.get(key), report.settings.get(key)) for key in SAME]
            if differing := [f"{key} {one} != {other}" for key, one, other in pairs if one != other]:
                raise ValueError(
                    f"{names[0]!r} and {report.name!r} did not answer the same samples ({', '.join(differing)}); "
                    "evaluate them with the same text, length, seed and numbers of samples and rows"
                )
        return cls(reports=tuple(reports))

    @classmethod
    def load(cls, places: Iterable[str | Path]) -> Comparison:
        """From runs, evaluations or their `report.json`. Two of one name are called by their folders.

        Raises:
            ValueError: as `LabReport.load` and `of`.
        """
        places = list(places)
        reports = [LabReport.load(place) for place in places]
        names = [report.name for report in reports]
        renamed = [
            replace(report, name=str(place)) if names.count(report.name) > 1 else report
            for report, place in zip(reports, places, strict=True)
        ]
        return cls.of(renamed)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that every run was asked and its dense model can do."""
        common = [{each.task for each in report.judged} for report in self.reports]
        return tuple(each.task for each in self.reports[0].judged if all(each.task in tasks for tasks in common))

    @property
    def points(self) -> tuple[RunPoint, ...]:
        """The runs, fewest bytes first."""
        shares = [report.kv_share for report in self.reports]
        recalls = [self._recall(report) for report in self.reports]
        losses = [report.loss_increase for report in self.reports]
        recall_front = pareto_front(shares, [mean for mean, _ in recalls])
        loss_front = pareto_front(shares, [-change for change, _ in losses])
        found = []
        for n, report in enumerate(self.reports):
            worst = report.worst
            found.append(
                RunPoint(
                    name=report.name,
                    kv_bytes=report.sparse.footprint.held,
                    kv_share=shares[n],
                    recall=recalls[n],
                    worst_task="" if worst is None else worst.task,
                    worst=(float("nan"), (float("nan"),) * 2) if worst is None else (worst.difference, worst.interval),
                    loss=losses[n],
                    best_recall=n in recall_front,
                    best_loss=n in loss_front,
                )
            )
        return tuple(sorted(found, key=lambda point: (point.kv_share, -point.recall[0])))

    def _recall(self, report: LabReport) -> tuple[float, Interval]:
        exact = [right for each in report.judged if each.task in self.tasks for right in each.sparse.exact]
        if not exact:
            return float("nan"), (float("nan"), float("nan"))
        return sum(exact) / len(exact), wilson_interval(sum(exact), len(exact))

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": [point.to_dict() for point in self.points],
            "tasks": list(self.tasks),
            "reports": [report.summary() for report in self.reports],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The runs as text, for tables; `COLUMNS` are its heads."""
        return [point_row(point) for point in self.points]


COLUMNS = (
    "run",
    "KV bytes",
    "of dense",
    "recall [95%]",
    "worst task",
    "change [95%]",
    "loss [95%]",
    "best for its bytes",
)


def point_row(point: RunPoint) -> tuple[str, ...]:
    """One run as text."""
    (worst, (low, high)), (loss, (less, more)) = point.worst, point.loss
    recall, (few, many) = point.recall
    best = [what for what, holds in (("recall", point.best_recall), ("loss", point.best_loss)) if holds]
    return (
        point.name,
        f"{point.kv_bytes:,}",
        f"{point.kv_share:.1%}",
        f"{recall:.3f} [{few:.2f}, {many:.2f}]",
        point.worst_task,
        f"{worst:+.3f} [{low:+.2f}, {high:+.2f}]",
        f"{loss:+.2%} [{less:+.2%}, {more:+.2%}]",
        ", ".join(best),
    )


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> set[int]:
    """Indices that no other has at once at no more cost and no less value, one of the two better; NaN is never in."""

    def dominated(n: int) -> bool:
        return any(
            cost[m] <= cost[n] and value[m] >= value[n] and (cost[m] < cost[n] or value[m] > value[n])
            for m in range(len(cost))
        )

    return {n for n in range(len(cost)) if value[n] == value[n] and not dominated(n)}
