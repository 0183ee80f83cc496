"""The plots of a study: what each recipe loses against the bytes that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_hf.figures import Figure
from sparse_hf_training.evaluation.cost_chart import cost_lines, plot_cost
from sparse_hf_training.study.figures import STAGE_TITLES

BYTES, DENSITY = "KV bytes, of dense", "density of prefill"


def plot_study(figures: Sequence[Figure], folder: Path, name: str) -> list[Path]:
    """Writes NAME_STAGE.png for each stage that the figures hold, a line per recipe, and returns their paths.

    They are drawn against the bytes kept, and where sparse heads free none (triangle, dynamic methods) against density.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    freed = any(figure.value < 100 for figure in figures if figure.case.endswith(f": {BYTES}"))
    column, x_label = (BYTES, "KV bytes kept, % of dense") if freed else (DENSITY, "density of a prefill, %")
    written = []
    for stage, title in STAGE_TITLES.items():
        if lines := cost_lines(figures, f"{title}, [^,]+ sparse", column):
            path = folder / f"{name}_{stage}.png"
            plot_cost(lines, path, x_label=x_label, title=f"{title}, means over seeds")
            written.append(path)
    return written
