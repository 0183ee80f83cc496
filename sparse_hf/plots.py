"""Figures of what was learned. matplotlib is optional (`sparse-hf[train]`) and its global state is left alone."""

from __future__ import annotations

import importlib.util
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
