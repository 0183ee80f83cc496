"""The evaluation's section of a model card."""

from __future__ import annotations

from pathlib import Path

from sparse_hf.model_card import markdown_table
from sparse_hf_training.evaluation.compare import COLUMNS, Comparison
from sparse_hf_training.evaluation.html_report import write_text
from sparse_hf_training.evaluation.page import TASK_COLUMNS, cost_rows, task_row

BEGIN, END = "<!-- sparse-hf evaluation -->", "<!-- end of the evaluation -->"


def card_section(comparison: Comparison) -> str:
    """Markdown between two markers: the runs, and the first one's tasks and costs."""
    report = comparison.reports[0]
    settings = report.settings
    blocks = [
        BEGIN,
        "## Evaluation",
        f"{settings['seq_len']} tokens, {settings['num_samples']} samples a task, generated; 95% intervals; p: McNemar "
        "against dense on the same samples, corrected by Holm. Measured by `sparse-hf eval`.",
    ]
    if len(comparison.reports) > 1:
        blocks.append(markdown_table(COLUMNS, comparison.rows()))
        blocks.append(f"### {report.name}")
    if report.judged:
        blocks.append(markdown_table(TASK_COLUMNS, [task_row(each) for each in report.judged]))
    if apart := [each.task for each in report.failed_by_dense]:
        blocks.append(f"Not judged, since the dense model itself fails them: {', '.join(apart)}.")
    blocks.append(markdown_table(("", "dense", "sparse", "change"), cost_rows(report)))
    return "\n\n".join([*blocks, END])


def update_card(path: Path, comparison: Comparison) -> None:
    """Puts the section into a Markdown file, in the place of an earlier one or at its end; the rest stays.

    Raises:
        ValueError: if the file has one marker without the other.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    section = card_section(comparison)
    start, end = text.find(BEGIN), text.find(END)
    if (start < 0) != (end < 0) or end < start:
        raise ValueError(f"{path} has one of {BEGIN} and {END} without the other; delete it")
    before, after = (text[:start], text[end + len(END) :]) if start >= 0 else (f"{text.rstrip()}\n\n".lstrip(), "\n")
    write_text(path, before + section + after)
