"""`sparse-hf eval`: what a sparse configuration costs its model, and what it saves."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="Artefact, run or Hub id; with --model also a preset or a file.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text: file, folder or Hub data set.")] = None,
    model: Annotated[str | None, typer.Option(help="Model for a TARGET that names none.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sample and row.")] = 2048,
    tasks: Annotated[str | None, typer.Option(help="Tasks, such as needle,vt:num_hops=8; see --list-tasks.")] = None,
    num_samples: Annotated[int | None, typer.Option(min=1, help="Samples per task; 200, or 40 if quick.")] = None,
    num_rows: Annotated[int | None, typer.Option(min=1, help="Rows for the loss; 32, or 8 if quick.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 1234,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that are answered side by side.")] = 8,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens per pass of a prefill; all by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few tasks and samples, for a first look.")] = False,
    min_dense: Annotated[float, typer.Option(min=0, max=1, help="Set tasks apart that dense does less often.")] = 0.5,
    strict_length: Annotated[bool, typer.Option("--strict-length", help="Refuse contexts that are too short.")] = False,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 on a GPU, else float32.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of TARGET on the Hub.")] = None,
    name: Annotated[str | None, typer.Option(help="What tables and plots call it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the cells and the report.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again under other settings.")] = False,
    figures: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Show the tasks and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a sparse model beside its dense self: recall with intervals, loss, KV bytes, density. Goes on if stopped.

    Example: sparse-hf eval runs/demo --text held_out.txt --seq-len 2048
    """
    with redirect_stdout(sys.stderr):  # some libraries print when they are imported
        from rich.console import Console

        from sparse_hf.cli.output import write, write_json
        from sparse_hf.figures import write_figures
        from sparse_hf_training.evaluation.command import EvaluationOptions, evaluate_target, task_rows
        from sparse_hf_training.evaluation.page import one_page

        if not list_tasks:
            if target is None:
                raise ValueError("nothing to measure; give a run, an artefact or a Hub id, or a preset with --model")
            options = EvaluationOptions(
                target=target,
                text=text,
                model=model,
                seq_len=seq_len,
                tasks=tasks,
                num_samples=num_samples or (40 if quick else 200),
                num_rows=num_rows or (8 if quick else 32),
                seed=seed,
                batch_size=batch_size,
                chunk=chunk,
                quick=quick,
                min_dense=min_dense,
                strict_length=strict_length,
                dtype=dtype,
                revision=revision,
                name=name,
                out=out,
                overwrite=overwrite,
            )
            report, folder = evaluate_target(options, Console(stderr=True))
            if figures is not None:
                write_figures(figures, report.figures(), command=options.command)
    if list_tasks:
        write_json(task_rows()) if as_json else write(*(f"{row['task']}: {row['asks']}" for row in task_rows()))
    elif as_json:
        write_json({**report.summary(), "folder": str(folder)})
    else:
        write(one_page(report), f"every sample, and what `sparse-hf compare` reads: {folder}")
