"""Which method loses least of what it reads? Methods on all heads at equal density: loss, recall and the worst task.

    python scripts/method_density.py --out docs/benchmarks --budget-minutes 20
    python scripts/method_density.py --model DIR --data HELD --calibration OTHER --seq-len 8192 --out docs/benchmarks

Searches each method's parameter on the calibration text, then judges it on the held one. Writes method_density.json
after every point, and a plot at the end, and keeps each measured cell under --cells, so that the same line goes on
where it stopped. On the shipped 4M model and books by default. .txt and .jsonl texts need no `datasets`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sparse_hf.bench.plan import require_known
from sparse_hf.calibrate.text import CalibrationText
from sparse_hf.figures import command_line, write_figures
from sparse_hf.plots import has_matplotlib
from sparse_hf.progress import progress_bar
from sparse_hf_training.demo.recipe import ASSETS
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.density_figures import density_figures, describe, plot_densities
from sparse_hf_training.evaluation.density_knobs import density_knobs
from sparse_hf_training.evaluation.equal_density import DensityPoint, EqualDensity, cell_settings
from sparse_hf_training.evaluation.method_quality import whole_rows
from sparse_hf_training.evaluation.script_options import add_options, load, names, shares

NAME = "method_density"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--calibration", default=str(ASSETS / "text" / "train"), help="text that settings are searched on"
    )
    parser.add_argument("--calibration-rows", type=int, default=4, help="rows of it, at most")
    parser.add_argument("--densities", type=shares, default=(0.1, 0.2, 0.3, 0.5), help="percent, such as 10,50")
    parser.add_argument("--tolerance", type=float, default=1.0, help="percentage points that a density may be off")
    parser.add_argument(
        "--methods", type=names, default=(), help=f"of {', '.join(density_knobs(8192))}; all by default"
    )
    parser.add_argument("--budget-minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--cells", type=Path, default=Path("runs/method_density"), help="folder of measured cells")
    parser.add_argument("--overwrite", action="store_true", help="forget cells of other settings")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {NAME}.json and {NAME}.png")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> EqualDensity:
    """The model, what judges it, and the text that settings are searched on."""
    model, judge = load(options)
    knobs = density_knobs(judge.seq_len)
    require_known("methods", options.methods, tuple(knobs))
    texts = CalibrationText(path=options.calibration).documents()
    rows = whole_rows(texts, judge.tokenizer, judge.seq_len, options.calibration_rows)
    ids = torch.stack([rows[number]["input_ids"] for number in range(len(rows))])  # type: ignore[arg-type]
    return EqualDensity(
        model,
        judge,
        ids,
        {name: knobs[name] for name in options.methods or knobs},
        targets=options.densities,
        tolerance=options.tolerance / 100,
        store=CellStore(options.cells, cell_settings(model, judge, ids, knobs), overwrite=options.overwrite),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    deadline = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    study = prepare(options)
    points: list[DensityPoint] = []
    console = Console(stderr=True)
    total = len(study.targets) * len(study.knobs)
    with progress_bar(console) as progress:
        bar = progress.add_task("points", total=total, figures="")

        def show(what: str) -> None:
            progress.update(bar, figures=what)

        dense = study.dense(lambda what: show(f"dense: {what}"))
        figures = density_figures(dense, points, study.judge.seq_len)
        for point in study.points(deadline=deadline, progress=show):
            points.append(point)
            progress.advance(bar)
            console.print(describe(point, dense), highlight=False)
            figures = density_figures(dense, points, study.judge.seq_len)
            # A run that is cut short leaves what it measured.
            write_figures(
                options.out / f"{NAME}.json", figures, command=command_line(f"python scripts/{NAME}.py", arguments)
            )
    if len(points) < total:
        console.print(f"time is up after {len(points)} of {total} points; the same line goes on")
    if not any(point.quality for point in points):
        return
    if has_matplotlib():
        plot_densities(figures, study.judge.seq_len, options.out / f"{NAME}.png")
    else:
        console.print('no plot: it needs matplotlib; pip install "sparse-hf[train]", and the same line draws it')


if __name__ == "__main__":
    main()
