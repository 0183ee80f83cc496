"""Heat maps of what a calibration found. matplotlib is optional (`sparse-hf[train]`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparse_hf.plots import require_matplotlib


def plot_maps(maps: Mapping[str, Tensor], path: str | Path) -> Path:
    """Writes heat maps side by side, layers downwards and heads to the right.

    Args:
        maps: title -> values `[num_layers, heads]`; NaN is left blank.
        path: the image; its suffix says which kind.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the suffix is no image format.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers = max(values.shape[0] for values in maps.values())
    widest = max(values.shape[1] for values in maps.values())
    size = (min(0.8 + (2.2 + 0.12 * widest) * len(maps), 24), min(1.6 + 0.2 * num_layers, 16))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, values) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(1, len(maps), number)
        image = axes.imshow(values.float().cpu().numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes)
        for axis, count in ((axes.yaxis, values.shape[0]), (axes.xaxis, values.shape[1])):
            axis.set_ticks(range(0, count, -(-count // 16)))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("head" if values.shape[1] > 1 else "")
        axes.set_ylabel("layer" if number == 1 else "")
    figure.savefig(Path(path), dpi=150)
    return Path(path)
