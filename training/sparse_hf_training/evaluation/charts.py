"""Charts of a comparison as SVG text, which stands in an HTML file by itself."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sparse_hf_training.evaluation.compare import Comparison
from sparse_hf_training.evaluation.report import LabReport
from sparse_hf_training.plots import canvas

DEPTH_BINS = 5
_MARKERS = "osD^vPX*"


def pareto_chart(comparison: Comparison) -> str:
    """Recall, and loss, against the bytes that a run holds; the line joins the runs that are best for their bytes."""
    figure, (recall, loss) = canvas(10, 3.9, 2)
    points = comparison.points
    names = [report.name for report in comparison.reports]
    for point in sorted(points, key=lambda point: names.index(point.name)):
        style = {
            "linestyle": "",
            "capsize": 3,
            "label": legend_label(point.name),
            **series_style(names.index(point.name)),
        }
        x = 100 * point.kv_share
        for axes, scale, (value, (low, high)) in ((recall, 1, point.recall), (loss, 100, point.loss)):
            spread = [[scale * (value - low)], [scale * (high - value)]]
            axes.errorbar(x, scale * value, yerr=spread, **style)
    _join(recall, [(100 * p.kv_share, p.recall[0]) for p in points if p.best_recall])
    _join(loss, [(100 * p.kv_share, 100 * p.loss[0]) for p in points if p.best_loss])
    recall.axhline(_dense_recall(comparison), color="grey", linewidth=0.8, linestyle=":", label="dense")
    loss.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    recall.set_ylabel("exact match, mean over tasks [95%]")
    recall.set_ylim(-0.03, 1.03)
    loss.set_ylabel("increase of the loss, % [95%]")
    for axes in (recall, loss):
        axes.set_xlabel("KV bytes, % of dense")
        axes.set_xlim(0, 103)
        axes.grid(alpha=0.3)
    figure.legend(*recall.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return _svg(figure, "pareto")


def tasks_chart(comparison: Comparison) -> str:
    """The change of each task's exact match in each run, with its interval."""
    tasks, reports = comparison.tasks, comparison.reports
    figure, (axes,) = canvas(10, 1.3 + 0.32 * max(len(tasks), 1) * max(1.0, 0.5 * len(reports)))
    for number, report in enumerate(reports):
        found = {each.task: each for each in report.judged}
        places = [row + 0.7 * (number + 0.5) / len(reports) - 0.35 for row in range(len(tasks))]
        changes = [found[task].difference for task in tasks]
        ends = [found[task].interval for task in tasks]
        spread = [[c - low for c, (low, _) in zip(changes, ends, strict=True)]]
        spread.append([high - c for c, (_, high) in zip(changes, ends, strict=True)])
        axes.errorbar(
            changes,
            places,
            xerr=spread,
            linestyle="",
            capsize=2,
            label=legend_label(report.name),
            **series_style(number),
        )
    axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlabel("exact match, sparse minus dense on the same samples [95%]")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return _svg(figure, "tasks")


def position_chart(comparison: Comparison) -> str:
    """The loss on held text by position, above that of dense; and exact match by the depth of the first fact."""
    figure, (losses, depths) = canvas(10, 3.9, 2)
    for report in comparison.reports:
        edges = report.sparse.text.edges
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        pairs = zip(report.sparse.text.bins, report.dense.text.bins, strict=True)
        losses.plot(middles, [sparse - dense for sparse, dense in pairs], marker=".", label=legend_label(report.name))
        depths.plot(*_by_depth(report), marker=".")
    losses.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    losses.set_xlabel("position in the document, tokens")
    losses.set_ylabel("loss above dense, nats per token")
    depths.set_xlabel("depth of the first fact, 0 = start of the context")
    depths.set_ylabel("exact match over all tasks")
    depths.set_ylim(-0.03, 1.03)
    for axes in (losses, depths):
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return _svg(figure, "position")


def memory_chart(comparison: Comparison) -> str:
    """Bytes of keys and values while a sequence is read and gone on with."""
    figure, (axes,) = canvas(10, 3.4)
    dense = comparison.reports[0].dense.footprint
    axes.plot(dense.tokens, [value / 2**20 for value in dense.kv_bytes], color="grey", linestyle=":", label="dense")
    for report in comparison.reports:
        kv = report.sparse.footprint
        axes.plot(kv.tokens, [value / 2**20 for value in kv.kv_bytes], label=legend_label(report.name))
    axes.set_xlabel("tokens read and written")
    axes.set_ylabel("KV cache, MiB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return _svg(figure, "memory")


def legend_label(name: str) -> str:
    """A name as matplotlib shows it as it is: a `$` begins no formula, and one that begins with `_` is not left out."""
    label = name.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def series_style(number: int) -> dict[str, str]:
    """Marker and colour of a run, the same in all charts."""
    return {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}"}


def _by_depth(report: LabReport) -> tuple[list[float], list[float]]:
    """Middles of the bins of depth that hold samples, and the share of them that is right."""
    bins: list[list[bool]] = [[] for _ in range(DEPTH_BINS)]
    for each in report.judged:
        for depth, exact in zip(each.sparse.depths, each.sparse.exact, strict=True):
            bins[min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)].append(exact)
    filled = [n for n, found in enumerate(bins) if found]
    return [(n + 0.5) / DEPTH_BINS for n in filled], [sum(bins[n]) / len(bins[n]) for n in filled]


def _dense_recall(comparison: Comparison) -> float:
    shares = [each.dense.share for each in comparison.reports[0].judged if each.task in comparison.tasks]
    return sum(shares) / len(shares) if shares else float("nan")


def _join(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    if len(points) > 1:
        axes.plot(*zip(*sorted(points), strict=True), color="black", linewidth=0.8, zorder=0)


def _svg(figure: Any, name: str) -> str:
    """The figure as an SVG element, the same in each run; the name keeps its ids apart from those of other charts."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
