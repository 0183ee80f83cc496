"""Figures of heads and of patterns. matplotlib is optional (`sparse-hf[train]`) and its global state is left alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises ImportError with the remedy if matplotlib is not installed."""
    if not has_matplotlib():
        raise ImportError('figures need matplotlib, which is not installed; pip install "sparse-hf[train]"')


def plot_head_masks(masks: Tensor, path: str | Path, scores: Tensor | None = None) -> Path:
    """Writes a map of the heads, layers downwards and KV heads to the right.

    Args:
        masks: `[num_layers, num_kv_heads]` of 0 (sparse) and 1 (full).
        path: the image; its suffix says which kind.
        scores: shown as colour, with a dot on each full head; without them the masks are the colour.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if scores and masks differ in shape, or the suffix is no image format.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if scores is not None and scores.shape != masks.shape:
        raise ValueError(f"scores must be {list(masks.shape)} as the masks, got {list(scores.shape)}")
    num_layers, num_heads = masks.shape
    figure = Figure(figsize=(2.4 + 0.28 * num_heads, 1.4 + 0.22 * num_layers), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = masks if scores is None else scores
    limits: dict[str, Any] = {"vmin": 0, "vmax": 1} if scores is None else {}
    image = axes.imshow(values.float().cpu().numpy(), cmap="viridis", aspect="auto", interpolation="nearest", **limits)
    if scores is not None:
        layers, heads = masks.nonzero(as_tuple=True)
        axes.scatter(heads.tolist(), layers.tolist(), s=14, c="white", edgecolors="black", linewidths=0.6)
        figure.colorbar(image, ax=axes, label="score")
    for axis, count in ((axes.yaxis, num_layers), (axes.xaxis, num_heads)):
        axis.set_ticks(range(0, count, -(-count // 16)))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    dots = "dot = full head" if scores is not None else "bright = full head"
    axes.set_title(f"{1 - masks.float().mean().item():.1%} sparse; {dots}", fontsize=9)
    figure.savefig(Path(path), dpi=150)
    return Path(path)


def plot_patterns(panels: Sequence[tuple[str, Tensor]], seq_len: int, path: str | Path, title: str) -> Path:
    """Writes maps of patterns side by side, queries downwards and keys to the right.

    Args:
        panels: a title and the share of kept pairs `[cells, cells]` of each.
        seq_len: tokens that the cells span.
        path: the image; its suffix says which kind.
        title: above all.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the suffix is no image format.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 3.4 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for number, (name, shares) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        # The square root shows a cell that keeps one key of many.
        image = axes.imshow(
            shares.sqrt().numpy(),
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0, seq_len, seq_len, 0),
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("key")
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=5)
        if number == 1:
            axes.set_ylabel("query")
    bar = figure.colorbar(image, ax=figure.axes, ticks=[share**0.5 for share in (0, 0.01, 0.1, 0.5, 1)], shrink=0.8)
    bar.ax.set_yticklabels(["0", "1%", "10%", "50%", "100%"])
    figure.savefig(Path(path), dpi=150)
    return Path(path)
