"""`sparse-hf train`: one run from a YAML file."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparse_hf_training.run_result import RunResult


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; configs/train/ has examples.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value or section.key=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1,
) -> None:
    """Choose heads, learn masks and weights, or fine-tune under frozen masks; goes on where a killed run stopped.

    Example: sparse-hf train configs/train/masks.yaml model=PATH masks.end_head_sparsity=0.7
    """
    # DeepSpeed's launcher gives local_rank, and LOCAL_RANK in the environment, which is what counts.
    with redirect_stdout(sys.stderr):  # some libraries print when they are imported
        from accelerate import PartialState
        from rich.console import Console

        from sparse_hf.cli.output import write_json
        from sparse_hf_training.config import RunConfig
        from sparse_hf_training.run import run_training

        result = run_training(RunConfig.load(config, overrides or ()), console=Console(stderr=True))
    if not PartialState().is_main_process:
        return
    if as_json:
        write_json(to_dict(result))
    else:
        _print(result)


def to_dict(result: RunResult) -> dict[str, object]:
    """The run's outcome, JSON-plain."""
    return {
        "artefact": str(result.artefact),
        "dense": None if result.dense is None else result.dense.to_dict(),
        "sparse": None if result.sparse is None else result.sparse.to_dict(),
        "scores": None if result.scores is None else result.scores.tolist(),
        "last_log": result.history[-1] if result.history else None,
        "summary": None if result.summary is None else result.summary.to_dict(),
    }


def _print(result: RunResult) -> None:
    from sparse_hf.cli.output import table, write
    from sparse_hf_training.observe.summary import figure_rows
    from sparse_hf_training.run_result import FIGURES_NAME

    rows = figure_rows(result.figures) if result.summary is None else result.summary.rows()
    write(table("the run", ("", "value", "dense"), rows))
    if result.sparse is None:
        write("no held text was given, so nothing was judged")
    write(f"artefact: {result.artefact}\nfigures: {result.artefact.parent / FIGURES_NAME}")
