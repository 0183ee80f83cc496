"""A report on one page of a terminal: verdict, tasks worst first, loss, memory."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparse_hf.cli.output import table
from sparse_hf_training.evaluation.report import LabReport, TaskComparison
from sparse_hf_training.evaluation.statistics import wilson_interval
from sparse_hf_training.evaluation.variant import TaskOutcome

TASK_COLUMNS = ("task", "dense", "sparse", "change", "p")


def one_page(report: LabReport) -> Group:
    """The report as rich renderables."""
    parts: list[Any] = [Text(line) for line in headline(report)]
    if report.judged:
        title = "exact match, worst task first [95% interval]; p: McNemar, corrected by Holm"
        parts.append(table(title, TASK_COLUMNS, map(task_row, report.judged), fixed=2))
    if report.failed_by_dense:
        rows = map(task_row, report.failed_by_dense)
        parts.append(table(f"set apart: dense itself is below {report.min_dense:.0%}", TASK_COLUMNS, rows, fixed=2))
    parts.append(cost_table(report))
    return Group(*parts)


def headline(report: LabReport) -> list[str]:
    """What was measured, and the worst of it."""
    settings, about = report.settings, report.about
    num_samples = settings["num_samples"]
    lines = [f"{report.name} on {about.get('base_model', 'its model')}: {about.get('sparsity', '')}".rstrip(": ")]
    lines.append(f"{settings['seq_len']} tokens, {num_samples} samples a task, seed {settings['seed']}")
    worst = report.worst
    if worst is None:
        lines.append("no task is left to judge: the dense model fails them all; try --tasks that it can do")
        return lines
    low, high = worst.interval
    increase, (loss_low, loss_high) = report.loss_increase
    lines.append(
        f"worst task: {worst.task} {worst.difference:+.3f} [{low:+.3f}, {high:+.3f}] "
        f"({'beyond' if worst.p_holm < 0.05 else 'within'} chance)"
    )
    lines.append(
        f"loss {increase:+.2%} [{loss_low:+.2%}, {loss_high:+.2%}]; KV cache {report.kv_share:.1%} of dense after "
        f"{report.sparse.footprint.tokens[-1]} tokens"
    )
    return lines


def task_row(each: TaskComparison) -> tuple[str, ...]:
    """The cells of one task."""
    low, high = each.interval
    return (
        each.task,
        f"{each.dense.share:.3f}",
        share_text(each.sparse),
        f"{each.difference:+.3f} [{low:+.2f}, {high:+.2f}]",
        f"{each.p_holm:.1g}",
    )


def share_text(outcome: TaskOutcome) -> str:
    """A share with its interval."""
    low, high = wilson_interval(outcome.num_exact, len(outcome.exact))
    return f"{outcome.share:.3f} [{low:.2f}, {high:.2f}]"


def cost_rows(report: LabReport) -> list[tuple[str, str, str, str]]:
    """What it costs and saves beside tasks: name, dense, sparse, change."""
    dense, sparse = report.dense, report.sparse
    increase, (low, high) = report.loss_increase
    late = [(dense.text.bins[n], sparse.text.bins[n]) for n in range(len(dense.text.bins) // 2, len(dense.text.bins))]
    late = [pair for pair in late if all(x == x for x in pair)]
    rows = [
        (
            "loss on held text, nats/token",
            f"{dense.text.mean:.4f}",
            f"{sparse.text.mean:.4f}",
            f"{increase:+.2%} [{low:+.2%}, {high:+.2%}]",
        )
    ]
    if late:
        before, after = (sum(values) / len(values) for values in zip(*late, strict=True))
        rows.append(("loss, late half of documents", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}"))
    if recall := [each.answer_losses for each in report.judged]:
        before, after = (sum(values) / len(values) for values in zip(*recall, strict=True))
        rows.append(("loss on answers of tasks", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"))
    tokens = sparse.footprint.tokens[-1]
    for name, before, after in (
        (f"KV bytes after {tokens} tokens", dense.footprint.held, sparse.footprint.held),
        ("KV bytes, peak", dense.footprint.peak, sparse.footprint.peak),
        ("KV bytes x tokens", dense.footprint.byte_tokens, sparse.footprint.byte_tokens),
        ("device memory, peak", dense.footprint.device_peak, sparse.footprint.device_peak),
    ):
        if before is not None and after is not None:
            rows.append((name, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%} of dense"))
    footprint = sparse.footprint
    rows.append(("density of prefill", "100%", f"{footprint.prefill_density:.1%}", ""))
    rows.append(("density of decoding", "100%", f"{footprint.decode_density:.1%}", ""))
    return rows


def cost_table(report: LabReport) -> Table:
    return table("loss, memory, density: measured", ("", "dense", "sparse", "change"), cost_rows(report))
