"""What sparsity costs against what it leaves: the worst task's change and the loss, a line per method or recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_hf.figures import Figure
from sparse_hf_training.evaluation.charts import series_style
from sparse_hf_training.plots import canvas

LOSS, WORST = "loss, increase", "worst task, change"


@dataclass(frozen=True, kw_only=True)
class CostPoint:
    """One point of a line.

    Args:
        x: what is left: density, bytes.
        loss: increase in % of dense.
        worst: change of the worst task, as a share.
        interval: of it.
    """

    x: float
    loss: float
    worst: float
    interval: tuple[float, float]


def cost_lines(figures: Sequence[Figure], group: str, x_column: str) -> dict[str, list[CostPoint]]:
    """The lines that figures hold, each with its points from left to right.

    Args:
        figures: with cases "GROUP, LINE: COLUMN", among others.
        group: a pattern of the groups whose points make up the lines.
        x_column: the column that they are drawn against.
    """
    values = {figure.case: figure.value for figure in figures}
    lines: dict[str, list[CostPoint]] = {}
    for case, x in values.items():
        if match := re.fullmatch(f"({group}, (?P<line>.+): ){re.escape(x_column)}", case):
            title = match[1]
            low, high = (values[f"{title}{WORST} (95% {end})"] for end in ("low", "high"))
            point = CostPoint(x=x, loss=values[title + LOSS], worst=values[title + WORST], interval=(low, high))
            lines.setdefault(match["line"], []).append(point)
    return {name: sorted(points, key=lambda point: point.x) for name, points in lines.items()}


def plot_cost(lines: Mapping[str, Sequence[CostPoint]], path: Path, *, x_label: str, title: str) -> None:
    """Writes both panels side by side; bars are the intervals of the worst task.

    Args:
        lines: points by name; there must be some.
        path: the image; its suffix says which kind.
        x_label: of both panels.
        title: above them.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure, (worst, loss) = canvas(11, 4.6, 2)
    for number, (name, points) in enumerate(lines.items()):
        style = {"label": name, "linewidth": 1.2, "markersize": 5, **series_style(number)}
        xs = [point.x for point in points]
        spread = [
            [point.worst - point.interval[0] for point in points],
            [point.interval[1] - point.worst for point in points],
        ]
        worst.errorbar(xs, [point.worst for point in points], yerr=spread, capsize=2, elinewidth=0.7, **style)
        loss.plot(xs, [point.loss for point in points], **style)
    worst.set_ylabel("worst task: change of exact match [95%]")
    loss.set_ylabel("increase of the loss on held text, %")
    for axes in (worst, loss):
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel(x_label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=150)
