"""`sparse-hf demo`: the whole product on a shipped 4M Llama, on a CPU, in minutes."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_hf_training.cli import require

if TYPE_CHECKING:
    from sparse_hf_training.demo import DemoReport

require("matplotlib")


def demo(
    output: Annotated[Path, typer.Option("--out", help="Run folder; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data, gates and random heads.")] = 0,
    mask_steps: Annotated[int, typer.Option(min=1, help="Steps that learn the head masks.")] = 120,
    tune_steps: Annotated[int, typer.Option(min=1, help="Steps that fine-tune the weights under them.")] = 190,
    num_samples: Annotated[int, typer.Option(min=1, help="Recall samples per task.")] = 24,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Learn which heads of a real Llama may be sparse, export, reload in a new process, generate, and judge.

    Example: sparse-hf demo --out runs/demo
    """
    with redirect_stdout(sys.stderr):  # some libraries print when they are imported
        from rich.console import Console

        from sparse_hf.cli.output import write_json
        from sparse_hf_training.demo import run_demo

        report = run_demo(
            output,
            mask_steps=mask_steps,
            tune_steps=tune_steps,
            num_samples=num_samples,
            seed=seed,
            console=Console(stderr=True),
        )
    if as_json:
        write_json(report.to_dict())
        return
    _print(report)


def _print(report: DemoReport) -> None:
    from sparse_hf.cli.output import table, write
    from sparse_hf_training.demo.demo import MAX_RECALL_LOSS, MAX_TEXT_LOSS
    from sparse_hf_training.demo.recipe import HEAD_SPARSITY, NUM_SINK_TOKENS, SEQ_LEN, WINDOW_SIZE

    judged = (report.dense, report.masks_only, report.learned)
    rows = [
        (
            f"recall {full.task}",
            *(f"{one.recall[n].exact_match:.2f}" for one in judged),
            f"{report.random_mean(n):.2f}",
        )
        for n, full in enumerate(report.dense.recall)
    ]
    random_loss = sum(draw.text_loss for draw in report.random) / len(report.random)
    losses = [*(one.text_loss for one in judged), random_loss]
    rows.append(("loss, nats/token", *(f"{loss:.4f}" for loss in losses)))
    held = f"{report.kv_bytes:,}"
    rows.append(("KV bytes", f"{report.dense_kv_bytes:,}", held, held, ""))
    title = (
        f"{HEAD_SPARSITY:.1%} of KV heads sparse: {NUM_SINK_TOKENS} sinks + {WINDOW_SIZE} tokens of {SEQ_LEN}\n"
        f"exact match on {report.dense.recall[0].num_samples} samples a task; "
        f"random heads: {len(report.random)} draws, {report.random[0].recall[0].num_samples} samples each"
    )
    columns = ("", "dense", "learned masks", "+ fine-tuned", "random heads")
    write(table(title, columns, rows))
    reloaded = report.reloaded
    write(
        f"reloaded in a new process, {reloaded['prompt_tokens']} tokens of prompt, "
        f"{reloaded['kv_bytes']:,} bytes of KV cache:",
        f'  "... {reloaded["question"]}" -> "{reloaded["generated"]}" (expected "{reloaded["expected"]}")',
    )
    verdict = "reached" if report.reached else "NOT reached"
    write(
        f"{verdict}: recall falls by {report.worst_recall_loss:.2f} at worst (bound {MAX_RECALL_LOSS}), "
        f"loss rises by {report.text_loss_increase:.2%} (bound {MAX_TEXT_LOSS:.0%})",
        f"plots, figures and the artefact: {report.output} ({report.seconds:.0f} s)",
    )
