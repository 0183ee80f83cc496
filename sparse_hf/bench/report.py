"""What a run leaves: a CSV of all measurements, plots, and the table of figures against their bounds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_hf.bench.session import Measurement, Session
from sparse_hf.figures import Figure
from sparse_hf.plots import require_matplotlib

COLUMNS = (
    "case",
    "contender",
    "work",
    "direction",
    "backend",
    "seq_len",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "dtype",
    "density",
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "useful_tflops",
    "ratio_to_best_peer",
    "share_of_matmul",
    "relative_error",
    "peak_mib",
    "absent_because",
)


def ratio_to_best_peer(measurement: Measurement, all_of_them: Sequence[Measurement]) -> float | None:
    """Rate over that of the fastest peer that did the same work in the same case, or None without one."""

    def problem(m: Measurement) -> tuple[Any, ...]:
        return m.case, m.work, m.direction, m.shape

    rivals = [m for m in all_of_them if not m.is_ours and problem(m) == problem(measurement)]
    return min(rival.ms for rival in rivals) / measurement.ms if measurement.is_ours and rivals else None


def csv_rows(session: Session) -> list[dict[str, Any]]:
    """One row per measurement, then one per absence; cells that do not apply are empty."""
    rows: list[dict[str, Any]] = []
    for m in session.measurements:
        rows.append(
            {
                **_shape_cells(m.shape),
                **_time_cells(m.sample),
                "case": m.case,
                "contender": m.contender,
                "work": m.work,
                "direction": m.direction,
                "backend": m.backend,
                "density": m.density,
                "useful_tflops": m.tflops,
                "ratio_to_best_peer": ratio_to_best_peer(m, session.measurements),
                "share_of_matmul": m.tflops / session.matmul_tflops if session.matmul_tflops else None,
                "relative_error": m.relative_error,
                "peak_mib": m.peak_mib,
            }
        )
    for other in session.others:
        shape = _shape_cells(other.shape) if other.shape else {}
        rows.append({**shape, **_time_cells(other.sample), "case": other.case, "contender": other.label})
    for absence in session.absences:
        rows.append({"case": absence.case, "contender": absence.contender, "absent_because": absence.reason})
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def _shape_cells(shape: Any) -> dict[str, Any]:
    names = ("seq_len", "num_heads", "num_kv_heads", "head_dim")
    return {**{name: getattr(shape, name) for name in names}, "dtype": str(shape.dtype).removeprefix("torch.")}


def _time_cells(sample: Any) -> dict[str, Any]:
    return {
        "rounds": len(sample.times_ms),
        "median_ms": sample.median,
        "p20_ms": sample.quantile(0.2),
        "p80_ms": sample.quantile(0.8),
    }


def write_csv(path: Path, session: Session) -> None:
    """Writes `csv_rows`, floats to six digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in csv_rows(session):
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def verdict(figure: Figure) -> str:
    """ "goal", "must" or "below" for a figure with bounds, else empty; "goal" only where one was set."""
    if figure.must is None:
        return ""

    def reaches(bound: float) -> bool:
        return figure.value <= bound if figure.lower_is_better else figure.value >= bound

    if figure.goal is not None and reaches(figure.goal):
        return "goal"
    return "must" if reaches(figure.must) else "below"


def summary_rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """Case, value, baseline, must, goal, unit and verdict of every figure."""
    return [
        (
            figure.case,
            f"{figure.value:.4g}",
            *("" if x is None else f"{x:.4g}" for x in (figure.baseline, figure.must, figure.goal)),
            figure.unit,
            verdict(figure),
        )
        for figure in figures
    ]


def plot_lengths(path: Path, measurements: Sequence[Measurement], head_dim: int) -> Path | None:
    """Useful TFLOP/s of dense attention by length, a line per contender; None if no such thing was measured.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    panels = [
        (direction, [m for m in measurements if m.case == f"dense-{direction}" and m.shape.head_dim == head_dim])
        for direction in ("forward", "backward")
    ]
    return plot_panels(
        path,
        [(f"dense causal {direction}, head_dim {head_dim}", _lines(ms)) for direction, ms in panels if ms],
        x_label="tokens",
        log_base=2,
    )


def plot_density(path: Path, measurements: Sequence[Measurement], head_dim: int) -> Path | None:
    """Useful TFLOP/s of random 128-blocks by density, dense at 1; None if no such thing was measured.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    panels = []
    for direction in ("forward", "backward"):
        ms = [m for m in measurements if m.case == f"blocks-{direction}" and m.shape.head_dim == head_dim]
        if ms:
            longest = max(m.shape.seq_len for m in ms)
            lines: dict[str, list[tuple[float, float]]] = {}
            for m in ms:
                if m.shape.seq_len == longest:
                    lines.setdefault(m.contender, []).append((m.density, m.tflops))
            panels.append((f"random 128-blocks {direction}, {longest} tokens, head_dim {head_dim}", lines))
    return plot_panels(path, panels, x_label="share of causal pairs kept", log_base=10)


def plot_speedups(path: Path, measurements: Sequence[Measurement], baseline: str) -> Path | None:
    """Time of a dense peer over ours by length, a line per pattern; None if no such pair was measured.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    panels = []
    for direction, title in (("forward", "forward"), ("both", "forward + backward")):
        ms = [m for m in measurements if m.direction == direction]
        dense = {m.shape: m.ms for m in ms if m.contender == baseline}
        lines: dict[str, list[tuple[float, float]]] = {}
        for m in ms:
            if m.is_ours and m.shape in dense:
                lines.setdefault(m.work, []).append((float(m.shape.seq_len), dense[m.shape] / m.ms))
        if lines:
            panels.append((f"{title}: speed-up over dense causal {baseline}", lines))
    return plot_panels(path, panels, x_label="tokens", log_base=2, y_label="speed-up", y_log=True)


def _lines(measurements: Sequence[Measurement]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for m in measurements:
        lines.setdefault(m.contender, []).append((float(m.shape.seq_len), m.tflops))
    return lines


def plot_panels(
    path: Path,
    panels: Sequence[tuple[str, dict[str, list[tuple[float, float]]]]],
    *,
    x_label: str,
    log_base: int,
    y_label: str = "useful TFLOP/s",
    y_log: bool = False,
) -> Path | None:
    """Lines of points side by side, a panel per (title, lines by name); None without panels.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if not panels:
        return None
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (title, lines) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            ours = name.startswith("sparse_hf")
            axes.plot(x, y, marker="o", markersize=4, label=name, linewidth=2.4 if ours else 1.2)
        axes.set_xscale("log", base=log_base)
        if y_log:
            axes.set_yscale("log", base=2)
            axes.axhline(1, color="black", linewidth=0.8)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    canvas.savefig(path, dpi=130)
    return path
