"""A comparison as one HTML file that opens offline: text, tables and inline SVG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sparse_hf.plots import require_matplotlib
from sparse_hf_training.evaluation.charts import memory_chart, pareto_chart, position_chart, tasks_chart
from sparse_hf_training.evaluation.compare import COLUMNS, Comparison
from sparse_hf_training.evaluation.page import TASK_COLUMNS, cost_rows, task_row
from sparse_hf_training.evaluation.report import LabReport

_TEMPLATE = "report.html.j2"


def html_report(comparison: Comparison) -> str:
    """The page.

    Raises:
        ImportError: if matplotlib or jinja2 is not installed.
    """
    require_matplotlib()
    from jinja2 import Environment

    settings = comparison.reports[0].settings
    template = Environment(autoescape=True).from_string((Path(__file__).parent / _TEMPLATE).read_text(encoding="utf-8"))
    names = [report.name for report in comparison.reports]
    base = comparison.reports[0].about.get("base_model", "one model")
    return template.render(
        title=f"What sparse attention costs {base}" if len(names) == 1 else f"Sparse attention on {base}, compared",
        subtitle=f"{settings['seq_len']} tokens, {settings['num_samples']} samples a task: {', '.join(names)}",
        columns=COLUMNS,
        rows=comparison.rows(),
        tasks=comparison.tasks,
        figures=_figures(comparison),
        reports=[_section(report) for report in comparison.reports],
        settings=", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("config", "head_masks")),
    )


def write_html_report(comparison: Comparison, path: Path) -> Path:
    """Writes the page, whole or not at all."""
    write_text(path, html_report(comparison))
    return path


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name beside the file and renames it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _figures(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Id, SVG and caption of each chart."""
    charts = [
        ("memory", memory_chart, "KV cache while a sequence is read in chunks and gone on with: measured."),
        ("position", position_chart, "Where in a document the loss rises, and how deep facts are found."),
    ]
    if comparison.tasks:
        first = [
            (
                "pareto",
                pareto_chart,
                "What runs keep for the bytes they hold. A line joins those best for their bytes.",
            ),
            ("tasks", tasks_chart, "Change of each task, worst of the first run on top."),
        ]
        charts = first + charts
    return [(name, chart(comparison), caption) for name, chart, caption in charts]


def _section(report: LabReport) -> dict[str, Any]:
    about = report.about
    return {
        "name": report.name,
        "about": f"{about.get('sparsity', '')}; methods: {', '.join(about.get('methods', []))}",
        "task_columns": TASK_COLUMNS,
        "tasks": [task_row(each) for each in report.judged],
        "apart": [task_row(each) for each in report.failed_by_dense],
        "cost_columns": ("", "dense", "sparse", "change"),
        "costs": cost_rows(report),
    }
