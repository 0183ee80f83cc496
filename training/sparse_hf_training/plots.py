"""Plots of a run: how training went, and what the heads can still recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_hf.plots import require_matplotlib

if TYPE_CHECKING:
    from sparse_hf_training.demo.demo import DemoReport


def _canvas(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure outside matplotlib's global state, and its axes."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


def plot_training(history: Sequence[dict[str, float]], path: Path) -> None:
    """Losses and sparsities over the steps of a trainer's logged rows.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure, (losses, sparsities) = _canvas(9, 3.2, 2)
    for axes, prefix in ((losses, "loss/"), (sparsities, "sparsity/")):
        for name in sorted({key for row in history for key in row if key.startswith(prefix)} - {"loss/penalty"}):
            rows = [row for row in history if name in row]
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name.removeprefix(prefix))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    losses.set_ylabel("nats per label token")
    losses.set_yscale("symlog", linthresh=1e-3)
    sparsities.set_ylabel("share of sparse heads")
    figure.savefig(path, dpi=150)


def plot_recall(report: DemoReport, path: Path) -> None:
    """Bars of exact match per task: dense, learned and random heads.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure, (axes,) = _canvas(6, 3.2)
    tasks = [result.task for result in report.dense.recall]
    series = {
        "dense": [result.exact_match for result in report.dense.recall],
        "learned masks": [result.exact_match for result in report.masks_only.recall],
        "fine-tuned": [result.exact_match for result in report.learned.recall],
        f"random (mean of {len(report.random)})": [report.random_mean(n) for n in range(len(tasks))],
    }
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        axes.bar([n + (number - 1.5) * width for n in range(len(tasks))], values, width, label=name)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("exact match")
    sparsity = 1 - report.head_masks.float().mean().item()
    axes.set_title(f"{sparsity:.1%} of KV heads sparse, {report.dense.recall[0].seq_len} tokens", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series), fontsize=8)
    figure.savefig(path, dpi=150)
