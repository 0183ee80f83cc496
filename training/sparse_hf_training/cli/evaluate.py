"""`sparse-hf eval`: what an artefact costs its model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_hf.figures import Figure


def evaluate(
    target: Annotated[str, typer.Argument(help="Artefact, training run or Hub id.")],
    text: Annotated[str, typer.Option(help="Held-out text: file, folder or Hub data set.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sample and row.")] = 2048,
    num_samples: Annotated[int, typer.Option(min=1, help="Recall samples per task.")] = 50,
    num_rows: Annotated[int, typer.Option(min=1, help="Rows for the loss.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 1234,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of TARGET on the Hub.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge an artefact beside its dense model: loss, recall per task, KV bytes, on the same samples.

    Example: sparse-hf eval runs/demo --text held_out.txt --seq-len 2048
    """
    with redirect_stdout(sys.stderr):  # some libraries print when they are imported
        import torch
        from rich.console import Console
        from transformers import AutoTokenizer

        from sparse_hf.artefact import load_artefact
        from sparse_hf.auto import AutoSparseModelForCausalLM
        from sparse_hf.cli.output import find_artefact, write, write_json
        from sparse_hf.figures import write_figures
        from sparse_hf.hub import resolve_artefact_folder
        from sparse_hf.patching import dense
        from sparse_hf.progress import progress_bar
        from sparse_hf_training.build import build_judge
        from sparse_hf_training.config import EvaluationConfig
        from sparse_hf_training.data import TextSource
        from sparse_hf_training.run import judgement_figures

        # A Hub id stays one: its repository may hold weights, which are looked for where the model is loaded.
        artefact = str(find_artefact(target)) if Path(target).is_dir() and revision is None else target
        config = EvaluationConfig(
            text=TextSource(path=text), seq_len=seq_len, num_samples=num_samples, num_rows=num_rows, seed=seed
        )
        base = load_artefact(resolve_artefact_folder(artefact, revision=revision)).base_model_name_or_path
        judge = build_judge(config, AutoTokenizer.from_pretrained(base))
        assert judge is not None
        model = AutoSparseModelForCausalLM.from_pretrained(artefact, revision=revision, dtype=torch.float32).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        console = Console(stderr=True)
        with progress_bar(console) as progress:
            task = progress.add_task("judging", total=2 * judge.steps, figures="sparse heads")
            after = judge(model, progress=lambda: progress.advance(task))
            progress.update(task, figures="dense heads")
            with dense(model):
                before = judge(model, progress=lambda: progress.advance(task))
        figures = judgement_figures(judge, before, after, model)
        if output is not None:
            write_figures(output, figures, command=f"sparse-hf eval {target} --text {text} --seq-len {seq_len}")
    if as_json:
        write_json([figure.__dict__ for figure in figures])
    else:
        write(figures_table(figures))


def figures_table(figures: list[Figure]) -> Table:
    """Cases with their sparse and dense values."""
    from sparse_hf.cli.output import table

    rows = [(f.case, f"{f.value:,.4g}", "" if f.baseline is None else f"{f.baseline:,.4g}", f.unit) for f in figures]
    return table("held-out figures", ("case", "sparse", "dense", "unit"), rows)
