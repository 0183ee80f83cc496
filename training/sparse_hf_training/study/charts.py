"""The plots of a study: what each recipe loses against the bytes that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_hf.figures import Figure
from sparse_hf_training.evaluation.cost_chart import cost_lines, plot_cost
from sparse_hf_training.study.figures import STAGE_TITLES


def plot_study(figures: Sequence[Figure], folder: Path, name: str) -> list[Path]:
    """Writes NAME_STAGE.png for each stage that the figures hold, a line per recipe, and returns their paths.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    written = []
    for stage, title in STAGE_TITLES.items():
        if lines := cost_lines(figures, f"{title}, [^,]+ sparse", "KV bytes, of dense"):
            path = folder / f"{name}_{stage}.png"
            plot_cost(lines, path, x_label="KV bytes kept, % of dense", title=f"{title}, means over seeds")
            written.append(path)
    return written
