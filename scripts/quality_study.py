"""Which recipe loses least per byte kept? Recipes that choose heads, side by side at equal KV bytes, on one model.

    python scripts/quality_study.py --out docs/benchmarks --budget-minutes 20
    python scripts/quality_study.py --model DIR --data TRAIN --held HELD --seq-len 8192 --window 1008 --out DIR

Writes NAME.json while it goes and at the end, with a plot of each stage (NAME_masks.png), and keeps each measured cell
under --cells, so that the same line goes on where it stopped. On the shipped 4M model and books by default. .txt and
.jsonl texts need no `datasets`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparse_hf.calibrate.text import CalibrationText
from sparse_hf.figures import Figure, command_line, write_figures
from sparse_hf.methods import Method, Streaming, Triangle, XAttention
from sparse_hf.plots import has_matplotlib
from sparse_hf.progress import progress_bar
from sparse_hf_training.data import DocumentStore, PackedTextDataset, pack_documents, text_documents
from sparse_hf_training.demo.recipe import ASSETS, MODEL, NUM_SINK_TOKENS, WINDOW_SIZE
from sparse_hf_training.evaluation.command import parse_tasks
from sparse_hf_training.evaluation.lab import Answers, Lab, check_length
from sparse_hf_training.evaluation.script_options import names, shares
from sparse_hf_training.evaluation.variant import VariantResult
from sparse_hf_training.study.bench import Bench
from sparse_hf_training.study.charts import plot_study
from sparse_hf_training.study.figures import study_figures
from sparse_hf_training.study.ranking import Ranking
from sparse_hf_training.study.side_by_side import run_side_by_side
from sparse_hf_training.study.study import Plan, Study, Unit
from sparse_hf_training.tasks import Filler

BRANCHES = ("streaming", "triangle", "xattention")
TASKS = "needle,key_value,chain,niah_multikey_2,two_turns"
TRAIN_TASKS = "needle,key_value,chain"
TUNE_TASKS = f"{TRAIN_TASKS},niah_multikey_2"
WRITE_SECONDS = 20
"""Between figures of a study that goes on."""
AS_OTHERS = {
    "train_window": "window",
    "tune_seq_len": "train_seq_len",
    "tune_steps": "steps",
    "tune_batch": "train_batch",
}
"""Options that are as others where they are not given."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id")
    parser.add_argument("--data", default=str(ASSETS / "text" / "train"), help="training text")
    parser.add_argument("--held", default=str(ASSETS / "text" / "validation"), help="held text")
    parser.add_argument("--recipes", type=names, default=Plan.recipes)
    parser.add_argument("--sparsities", type=shares, default=Plan.sparsities, help="percent, such as 50,75")
    parser.add_argument("--stages", type=names, default=Plan.stages)
    parser.add_argument("--seeds", type=int, default=Plan.num_seeds)
    parser.add_argument("--branch", choices=BRANCHES, default=BRANCHES[0], help="method of sparse heads")
    parser.add_argument("--sinks", type=int, default=NUM_SINK_TOKENS)
    parser.add_argument("--window", type=int, default=WINDOW_SIZE)
    parser.add_argument("--tasks", default=TASKS, help="as sparse-hf eval --tasks")
    parser.add_argument("--train-tasks", default=TRAIN_TASKS, help="that recipes learn heads from")
    parser.add_argument("--tune-tasks", default=TUNE_TASKS, help="that weights are tuned on")
    parser.add_argument("--seq-len", type=int, default=2048, help="of samples and rows that are measured")
    parser.add_argument("--train-seq-len", type=int, default=1024, help="of rows that recipes learn heads from")
    parser.add_argument("--train-window", type=int, help="while they do; as --window")
    parser.add_argument("--tune-seq-len", type=int, help="of rows that weights are tuned on; as --train-seq-len")
    parser.add_argument("--samples", type=int, default=200, help="per task")
    parser.add_argument("--rows", type=int, default=32, help="of held text")
    parser.add_argument("--steps", type=int, default=120, help="of every recipe that learns")
    parser.add_argument("--tune-steps", type=int, help="of tuning; as --steps")
    parser.add_argument("--train-batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--tune-batch", type=int, help="the same of tuning; as --train-batch")
    parser.add_argument("--batch-size", type=int, default=8, help="samples answered side by side")
    parser.add_argument("--answers", choices=get_args(Answers), help="default: forward for streaming heads")
    parser.add_argument("--tune-rate", type=float, default=Plan.tune_rate)
    parser.add_argument("--tune-recall-share", type=float, default=Plan.tune_recall_share, help="the rest is text")
    parser.add_argument("--jobs", type=int, default=1, help="units measured side by side, spread over the GPUs")
    parser.add_argument("--budget-minutes", type=float, help="measure nothing new after so long")
    parser.add_argument("--name", default="quality_study", help="of the file of figures")
    parser.add_argument("--cells", type=Path, default=Path("runs/quality_study"), help="folder of measured cells")
    parser.add_argument("--overwrite", action="store_true", help="forget cells of other settings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    options = parser.parse_args(arguments)
    for name, other in AS_OTHERS.items():
        if getattr(options, name) is None:
            setattr(options, name, getattr(options, other))
    return options


def branch(options: argparse.Namespace, window_size: int) -> Method:
    """The method of sparse heads."""
    window = {"num_sink_tokens": options.sinks, "window_size": window_size}
    if options.branch == "xattention":
        return XAttention()
    return Triangle(**window) if options.branch == "triangle" else Streaming(**window)


def load_model(path: str) -> PreTrainedModel:
    """On the device of the process that asks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)  # type: ignore[no-any-return]


def packed_rows(documents: DocumentStore, seq_len: int) -> PackedTextDataset:
    return PackedTextDataset(pack_documents(documents, seq_len)[0])


def prepare(options: argparse.Namespace) -> tuple[Bench, Bench, Lab]:
    """The model with what its heads are ranked on, the same with what its weights are tuned on, and what is measured on
    held text. All can be pickled."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, held = (list(CalibrationText(path=path).documents()) for path in (options.data, options.held))
    # Most of what preparing takes: once for rows of all lengths.
    documents = DocumentStore.from_documents(text_documents(train, tokenizer))
    bench = Bench(
        load=partial(load_model, options.model),
        tokenizer=tokenizer,
        branch=branch(options, options.train_window),
        filler=Filler.from_texts(train, tokenizer),
        rows=packed_rows(documents, options.train_seq_len),
        tasks=parse_tasks(options.train_tasks),
        seq_len=options.train_seq_len,
        batch_size=options.train_batch,
        max_steps=options.steps,
    )
    tuning = replace(
        bench,
        branch=branch(options, options.window),
        rows=packed_rows(documents, options.tune_seq_len),
        tasks=parse_tasks(options.tune_tasks),
        seq_len=options.tune_seq_len,
        batch_size=options.tune_batch,
        max_steps=options.tune_steps,
    )
    lab = Lab(
        tokenizer=tokenizer,
        tasks=parse_tasks(options.tasks),
        filler=Filler.from_texts(held, tokenizer),
        rows=packed_rows(DocumentStore.from_documents(text_documents(held, tokenizer)), options.seq_len),
        seq_len=options.seq_len,
        num_samples=options.samples,
        num_rows=options.rows,
        batch_size=options.batch_size,
        answers=options.answers or ("forward" if isinstance(tuning.branch, Streaming) else "generate"),
    )
    return bench, tuning, lab


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    deadline = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    plan = Plan(
        recipes=options.recipes,
        sparsities=options.sparsities,
        num_seeds=options.seeds,
        stages=options.stages,
        tune_rate=options.tune_rate,
        tune_recall_share=options.tune_recall_share,
    )
    bench, tuning, lab = prepare(options)
    study = Study(bench, lab, plan, options.cells, tuning=tuning, overwrite=options.overwrite)
    check_length(study.model, options.seq_len)
    found: dict[Unit, VariantResult] = {}
    rankings: dict[Unit, Ranking | None] = {}
    figures: list[Figure] = []
    dense: VariantResult | None = None
    console = Console(stderr=True)
    total = len(list(study.plan.units()))
    written = time.monotonic()

    def write(dense: VariantResult) -> list[Figure]:
        ordered = {unit: found[unit] for unit in study.plan.units() if unit in found}
        figures = study_figures(dense, ordered, rankings)
        command = command_line("python scripts/quality_study.py", arguments)
        write_figures(options.out / f"{options.name}.json", figures, command=command)
        return figures

    with progress_bar(console) as progress:
        bar = progress.add_task("units", total=total, figures="dense")

        def show(unit: Unit | None, what: str) -> None:
            progress.update(bar, figures=f"{'dense' if unit is None else unit.variant}: {what}")

        if options.jobs == 1:
            results = study.run(deadline=deadline, progress=show)
        else:
            results = run_side_by_side(study, options.jobs, deadline=deadline, progress=show)
        for unit, result in results:
            if unit is None:
                dense = result
                continue
            assert dense is not None
            found[unit] = result
            progress.advance(bar)
            rankings[unit] = study.ranking(unit)
            # A study that is cut short leaves what it measured; intervals of all units take longer than reading them.
            if time.monotonic() - written > WRITE_SECONDS:
                figures, written = write(dense), time.monotonic()
            recall = ", ".join(f"{task.task} {task.share:.2f}" for task in result.tasks)
            console.print(f"{unit.variant}: {recall}, loss {result.text.mean:.4f}", highlight=False)
    if dense is not None and found:
        figures = write(dense)
    if len(found) < total:
        console.print(f"time is up after {len(found)} of {total} units; the same line goes on")
    if has_matplotlib():
        plot_study(figures, options.out, options.name)
    else:
        console.print('no plots: they need matplotlib; pip install "sparse-hf[train]", and the same line draws them')


if __name__ == "__main__":
    main()
