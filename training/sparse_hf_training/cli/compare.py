"""`sparse-hf compare`: evaluated runs side by side, as a table, an HTML report and a model card's section."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from sparse_hf_training.cli import require

require("matplotlib", "jinja2")

SHOWN = ("run", "of dense", "recall [95%]", "worst task", "change [95%]", "loss [95%]")
"""Columns that a terminal has room for; the HTML report has all."""


def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs or folders that `sparse-hf eval` measured.")],
    out: Annotated[Path | None, typer.Option(help="Write an HTML report, one file that opens offline.")] = None,
    card: Annotated[Path | None, typer.Option(help="Put the figures into this model card.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Set runs side by side: recall and loss against KV bytes, and which are best for their bytes.

    Example: sparse-hf compare runs/masks runs/duo --out report.html --card runs/masks/artefact/README.md
    """
    with redirect_stdout(sys.stderr):  # some libraries print when they are imported
        from sparse_hf.cli.output import table, write, write_json
        from sparse_hf_training.evaluation.card import update_card
        from sparse_hf_training.evaluation.compare import COLUMNS, Comparison
        from sparse_hf_training.evaluation.html_report import write_html_report

        found = Comparison.load(runs)
        if out is not None:
            write_html_report(found, out)
        if card is not None:
            update_card(card, found)
    if as_json:
        write_json(found.to_dict())
        return
    shown = [COLUMNS.index(name) for name in SHOWN]
    rows = ([row[n] for n in shown] for row in found.rows())
    write(table(f"KV bytes of dense; recall: mean of {', '.join(found.tasks) or 'no task'}", SHOWN, rows, fixed=2))
    for path in filter(None, (out, card)):
        write(f"written: {path}")
