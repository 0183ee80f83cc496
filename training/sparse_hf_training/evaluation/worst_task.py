"""Figures of recall with the worst task first, beside dense on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_hf.figures import Figure
from sparse_hf_training.evaluation.report import MIN_DENSE
from sparse_hf_training.evaluation.statistics import design_effect, paired_difference_interval, wilson_interval

Outcomes = Mapping[str, Sequence[bool]]
"""Task -> whether each sample was answered."""


def answered_by_dense(dense: Outcomes) -> list[str]:
    """The tasks that say something: the others dense itself fails.

    Raises:
        ValueError: if it fails every task.
    """
    names = [name for name, exact in dense.items() if sum(exact) / len(exact) >= MIN_DENSE]
    if not names:
        raise ValueError(
            f"the dense model answers no task in {MIN_DENSE:.0%} of the samples: there is nothing to compare; give "
            "easier tasks, or a model that recalls"
        )
    return names


def worst_task(found: Outcomes, dense: Outcomes) -> tuple[str, float]:
    """The task whose share of right samples falls most below dense, and by how much it changes."""
    changes = {name: sum(exact) / len(exact) - sum(dense[name]) / len(dense[name]) for name, exact in found.items()}
    worst = min(changes, key=lambda name: changes[name])
    return worst, changes[worst]


def recall_figures(title: str, runs: Sequence[Outcomes], dense: Outcomes) -> list[Figure]:
    """Recall over all tasks, the worst task's change from dense, each with its 95% interval, and each task's recall.

    Shares are of all runs. Intervals are over samples, those of different tasks taken as drawn from one population: a
    sample that several runs answered counts as one to `num_runs` independent ones, by their `design_effect`.

    Args:
        title: what cases begin with.
        runs: one for each seed, all of the tasks to compare, on the same samples in the same order.
        dense: these tasks on the same samples, one run.

    Raises:
        ValueError: if runs and dense are not of the same samples.
    """
    figures: list[Figure] = []
    found = {name: [right for run in runs for right in run[name]] for name in runs[0]}

    def add(column: str, value: float, baseline: float | None = None) -> None:
        case = f"{title}: {column}"
        figures.append(Figure(case=case, value=value, unit="share", lower_is_better=False, baseline=baseline))

    def ends(column: str, interval: tuple[float, float]) -> None:
        for end, value in zip(("low", "high"), interval, strict=True):
            add(f"{column} (95% {end})", value)

    shares = {name: sum(dense[name]) / len(dense[name]) for name in found}
    every = [right for exact in found.values() for right in exact]
    add("recall", sum(every) / len(every), sum(shares.values()) / len(shares))
    effect = design_effect([[right for name in found for right in run[name]] for run in runs])
    ends("recall", wilson_interval(sum(every) / effect, len(every) / effect))
    worst, change = worst_task(found, dense)
    add("worst task, change", change, 0.0)
    beside = [*dense[worst]] * len(runs)
    ends("worst task, change", paired_difference_interval(found[worst], beside, num_runs=len(runs)))
    for name, exact in found.items():
        add(f"recall {name}", sum(exact) / len(exact), shares[name])
    return figures
