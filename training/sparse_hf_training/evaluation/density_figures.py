"""The figures and the plot of methods at equal density."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparse_hf.figures import Figure
from sparse_hf_training.evaluation.cost_chart import cost_lines, plot_cost
from sparse_hf_training.evaluation.equal_density import DensityPoint
from sparse_hf_training.evaluation.judge import Judgement
from sparse_hf_training.evaluation.method_quality import MethodQuality
from sparse_hf_training.evaluation.worst_task import answered_by_dense, recall_figures, worst_task


def density_figures(dense: MethodQuality, points: Iterable[DensityPoint], seq_len: int) -> list[Figure]:
    """Dense, then per density and method: density and knob, loss, recall and the worst task, beside dense.

    A case reads "at 20% density, METHOD: COLUMN", as `scripts/make_tables.py` wants it for a grid. Tasks that dense
    fails are left out, and so are points that were not reached.

    Raises:
        ValueError: if dense fails every task.
    """
    base = _outcomes(dense.judgement)
    names = answered_by_dense(base)
    base = {name: base[name] for name in names}
    loss = dense.judgement.text_loss
    figures = [_figure(f"dense, {seq_len} tokens: loss on held text", loss, "nats/token", lower=True)]
    figures += [
        _figure(f"dense, {seq_len} tokens: recall {name}", sum(exact) / len(exact), "share")
        for name, exact in base.items()
    ]
    for point in points:
        if point.quality is None:
            continue
        title = f"at {100 * point.target:g}% density, {point.method}"
        found = _outcomes(point.quality.judgement)
        increase = 100 * (point.quality.judgement.text_loss / loss - 1)
        figures += [
            _figure(f"{title}: knob", point.setting, "setting", lower=True),
            _figure(f"{title}: density", 100 * point.quality.density, "%", lower=True, baseline=100.0),
            _figure(f"{title}: density of calibration", 100 * point.calibrated, "%", lower=True, baseline=100.0),
            _figure(f"{title}: loss, increase", increase, "%", lower=True, baseline=0.0),
            *recall_figures(title, [{name: found[name] for name in names}], base),
        ]
    return figures


def describe(point: DensityPoint, dense: MethodQuality) -> str:
    """A line for the console: what was found, or why the point is left out."""
    if point.quality is None:
        return f"left out {point.described}: no setting comes nearer, and it reads {point.calibrated:.2%}"
    base, found = _outcomes(dense.judgement), _outcomes(point.quality.judgement)
    names = answered_by_dense(base)
    worst, change = worst_task({name: found[name] for name in names}, base)
    return (
        f"{point.described}: density {point.quality.density:.2%}, loss {point.quality.judgement.text_loss:.4f}, "
        f"worst task {worst} {change:+.3f}"
    )


def plot_densities(figures: Sequence[Figure], seq_len: int, path: Path) -> None:
    """Loss and worst task against the density that was read while judging, a line per method.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    lines = cost_lines(figures, "at [^,]+ density", "density")
    plot_cost(lines, path, x_label="density, % of the causal pairs", title=f"methods on all heads, {seq_len} tokens")


def _outcomes(judgement: Judgement) -> dict[str, tuple[bool, ...]]:
    found = {}
    for result in judgement.recall:
        assert result.exact is not None, "cells keep samples"
        found[result.task] = result.exact
    return found


def _figure(case: str, value: float, unit: str, *, lower: bool = False, baseline: float | None = None) -> Figure:
    return Figure(case=case, value=value, unit=unit, lower_is_better=lower, baseline=baseline)
