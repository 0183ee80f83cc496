"""Plots of a run: how training went, and what the heads can still recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_hf.plots import require_matplotlib

if TYPE_CHECKING:
    from sparse_hf_training.demo.demo import DemoReport
    from sparse_hf_training.observe.heat_maps import MaskSnapshot


def canvas(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure outside matplotlib's global state, and its axes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
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
    figure, (losses, sparsities) = canvas(9, 3.2, 2)
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
    figure, (axes,) = canvas(6, 3.2)
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


def mask_image(openness: Sequence[Sequence[float]], title: str) -> np.ndarray:
    """A map of gates, layers downwards and KV heads to the right: uint8 `[height, width, 3]`.

    Args:
        openness: 1 - expected sparsity `[num_layers, num_kv_heads]`, in [0, 1].
        title: above it.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    num_layers, num_heads = len(openness), len(openness[0])
    figure, (axes,) = canvas(2.4 + 0.28 * num_heads, 1.4 + 0.22 * num_layers)
    _draw_openness(figure, axes, openness, title)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    return np.ascontiguousarray(pixels[..., :3])


def plot_mask_history(history: Sequence[MaskSnapshot], path: Path) -> None:
    """First, middle and last map of the gates, and every gate over the steps.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the history is empty.
    """
    if not history:
        raise ValueError("the history of the masks is empty; it is written while gates train")
    rows, columns = len(history[0].openness), len(history[0].openness[0])
    figure, axes = canvas(4 + 3 * (2.0 + 0.2 * columns), 1.6 + 0.22 * max(rows, 8), 4)
    for place, number in zip(axes, (0, len(history) // 2, len(history) - 1), strict=False):
        _draw_openness(figure, place, history[number].openness, f"step {history[number].step}", bar=False)
    series = np.asarray([snapshot.openness for snapshot in history]).reshape(len(history), rows * columns)
    image = axes[3].imshow(series.T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes[3].set_title("every gate over the steps", fontsize=9)
    ticks = sorted({0, len(history) // 2, len(history) - 1})
    axes[3].set_xticks(ticks, [str(history[tick].step) for tick in ticks])
    axes[3].set_yticks(range(0, rows * columns, columns * -(-rows // 16)), range(0, rows, -(-rows // 16)))
    axes[3].set_xlabel("step")
    axes[3].set_ylabel("layer")
    figure.colorbar(image, ax=axes[3], label="1 - expected sparsity")
    figure.savefig(path, dpi=150)


def _draw_openness(
    figure: Any, axes: Any, openness: Sequence[Sequence[float]], title: str, *, bar: bool = True
) -> None:
    values = np.asarray(openness)
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for axis, count in ((axes.yaxis, values.shape[0]), (axes.xaxis, values.shape[1])):
        axis.set_ticks(range(0, count, -(-count // 16)))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title(f"{title}: {1 - values.mean():.1%} sparse expected", fontsize=9)
    if bar:
        figure.colorbar(image, ax=axes, label="1 - expected sparsity")
