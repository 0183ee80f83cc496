"""A study's figures in the project's schema: one row of a table per recipe, stage and sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_hf.figures import Figure
from sparse_hf_training.evaluation.statistics import bootstrap_interval
from sparse_hf_training.evaluation.variant import VariantResult
from sparse_hf_training.evaluation.worst_task import Outcomes, answered_by_dense, recall_figures, worst_task
from sparse_hf_training.study.ranking import Ranking
from sparse_hf_training.study.study import Unit

STAGE_TITLES = {"masks": "masks only", "masks_and_weights": "masks and weights"}

RECOMMENDED = "elimination"
"""The recipe that the others are compared with."""


def study_figures(
    dense: VariantResult, found: Mapping[Unit, VariantResult], rankings: Mapping[Unit, Ranking | None]
) -> list[Figure]:
    """Per stage, sparsity and recipe, over its seeds: recall, the worst task, loss and bytes, beside dense; and what it
    took to rank the heads.

    Tasks that dense fails are left out. A case reads "masks only, 75% sparse, RECIPE: COLUMN", as
    `scripts/make_tables.py` wants it for a grid. Intervals are over samples, each of which all seeds answer
    (`recall_figures`); the lowest seed stands beside them, since samples do not tell how another seed would differ.
    Where `RECOMMENDED` was measured the others have what they differ by from it, sample by sample.

    Args:
        dense: what all are compared with.
        found: what was measured of each unit.
        rankings: where each unit's heads come from, None where no heads are chosen.

    Raises:
        ValueError: if dense fails every task.
    """
    names = answered_by_dense(_outcomes(dense))
    groups: dict[tuple[str, float, str], list[Unit]] = {}
    for unit in found:
        groups.setdefault((unit.stage, unit.head_sparsity, unit.recipe), []).append(unit)
    figures: list[Figure] = []
    for (stage, sparsity, recipe), units in groups.items():
        title = f"{STAGE_TITLES[stage]}, {100 * sparsity:g}% sparse, {recipe}"
        results = [found[unit] for unit in units]
        figures += _recipe_figures(title, dense, results, names)
        others = groups.get((stage, sparsity, RECOMMENDED), [])
        if others and recipe != RECOMMENDED:
            figures += _differences(title, dense, results, [found[unit] for unit in others], names)
        figures += _cost_figures(title, [ranking for unit in units if (ranking := rankings[unit]) is not None])
    return figures


def _cost_figures(title: str, rankings: Sequence[Ranking]) -> list[Figure]:
    if not rankings:
        return []
    columns = {
        "heads found in": (sum(ranking.seconds for ranking in rankings) / len(rankings), "s"),
        "tokens read to find them": (
            sum(ranking.tokens for ranking in rankings) / len(rankings) / 1e6,
            "million tokens",
        ),
    }
    return [
        Figure(case=f"{title}: {column}", value=value, unit=unit, lower_is_better=True)
        for column, (value, unit) in columns.items()
    ]


def _recipe_figures(
    title: str, dense: VariantResult, results: Sequence[VariantResult], names: Sequence[str]
) -> list[Figure]:
    outcomes = [{name: _outcomes(result)[name] for name in names} for result in results]
    base = {task.task: task for task in dense.tasks if task.task in names}
    figures = recall_figures(title, outcomes, _outcomes(dense))

    def add(column: str, value: float, unit: str, *, lower: bool = False, baseline: float | None = None) -> None:
        figures.append(
            Figure(case=f"{title}: {column}", value=value, unit=unit, lower_is_better=lower, baseline=baseline)
        )

    # The largest fall of any task in any seed.
    lowest = min(task.share - base[task.task].share for result in results for task in result.tasks if task.task in base)
    add("worst task, change, lowest seed", lowest, "share", baseline=0.0)
    losses = [result.text.mean / dense.text.mean - 1 for result in results]
    add("loss, increase", 100 * sum(losses) / len(losses), "%", lower=True, baseline=0.0)
    held = [result.footprint.held / dense.footprint.held for result in results]
    add("KV bytes, of dense", 100 * sum(held) / len(held), "%", lower=True, baseline=100.0)
    density = [result.footprint.prefill_density for result in results]
    add("density of prefill", 100 * sum(density) / len(density), "%", lower=True, baseline=100.0)
    add("seeds", float(len(results)), "count")
    if checked := sum(task.num_checked for result in results for task in result.tasks):
        add("answers that generate gave too", float(checked), "count")
        differing = sum(task.num_differing for result in results for task in result.tasks)
        add("of them, other answers", float(differing), "count", lower=True, baseline=0.0)
    return figures


def _differences(
    title: str,
    dense: VariantResult,
    results: Sequence[VariantResult],
    others: Sequence[VariantResult],
    names: Sequence[str],
) -> list[Figure]:
    """Recall over all tasks, and of the recipe's own worst task, minus that of `RECOMMENDED`: means over the seeds of
    both, with a bootstrap interval over samples."""
    each = {name: [a - b for a, b in zip(_means(results, name), _means(others, name), strict=True)] for name in names}
    runs = {name: [right for result in results for right in _outcomes(result)[name]] for name in names}
    worst, _ = worst_task(runs, _outcomes(dense))
    columns = {"recall": [value for name in names for value in each[name]], "worst task": each[worst]}
    figures = []
    for column, values in columns.items():
        low, high = bootstrap_interval(values)
        ends = {"": sum(values) / len(values), " (95% low)": low, " (95% high)": high}
        figures += [
            Figure(
                case=f"{title}: {column}, minus {RECOMMENDED}{end}", value=value, unit="share", lower_is_better=False
            )
            for end, value in ends.items()
        ]
    return figures


def _means(results: Sequence[VariantResult], task: str) -> list[float]:
    """The share of seeds that answered each sample."""
    outcomes = [_outcomes(result)[task] for result in results]
    return [sum(seeds) / len(seeds) for seeds in zip(*outcomes, strict=True)]


def _outcomes(result: VariantResult) -> Outcomes:
    return {task.task: task.exact for task in result.tasks}
