"""`sparse-hf lm-eval`: lm-evaluation-harness with the model class `sparse-hf`, which it cannot find by itself."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparse_hf_training.cli import require

require("lm_eval")


def lm_eval(
    arguments: Annotated[list[str], typer.Argument(help="What lm_eval takes, `--model sparse-hf` included.")],
) -> None:
    """Run lm-evaluation-harness on a sparse model; `lm_eval run --help` shows its options.

    Example: sparse-hf lm-eval run --model sparse-hf --model_args pretrained=MODEL,sparse=ARTEFACT --tasks NAME
    """
    from lm_eval.__main__ import cli_evaluate

    import sparse_hf_training.evaluation.lm_eval_model  # noqa: F401  (registers the class)

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


# Options are lm_eval's, not ours: the application reads this where it registers the command.
lm_eval.context_settings = {"ignore_unknown_options": True}  # type: ignore[attr-defined]
