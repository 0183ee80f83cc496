"""What does each method cost a model when all heads follow it? Density, loss on held text and recall at full context.

    python scripts/method_quality.py --model DIR --data FILE --seq-len 8192 --out docs/benchmarks

Writes method_quality.json. On the shipped 4M model and novel by default; a GPU makes it minutes. .txt and .jsonl texts
need no `datasets`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_hf.bench.method_plan import METHODS
from sparse_hf.bench.plan import require_known
from sparse_hf.calibrate.text import CalibrationText
from sparse_hf.figures import write_figures
from sparse_hf.progress import progress_bar
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.evaluation import Judge
from sparse_hf_training.evaluation.method_quality import judge_methods, quality_figures, whole_rows
from sparse_hf_training.tasks import Filler, make_task

TASKS = ("needle", "key_value", "chain")
FILE = "method_quality.json"


def names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id")
    parser.add_argument("--data", default=str(ASSETS / "text" / "validation"), help="held text: .txt, .jsonl, .parquet")
    parser.add_argument("--seq-len", type=int, help="by default the model's context")
    parser.add_argument("--samples", type=int, default=100, help="recall samples per task")
    parser.add_argument("--batch-size", type=int, default=8, help="recall samples per forward pass")
    parser.add_argument("--rows", type=int, default=64, help="rows of text for the loss, at most")
    parser.add_argument("--methods", type=names, default=(), help=f"of {', '.join(METHODS)}; all by default")
    parser.add_argument("--tasks", type=names, default=TASKS)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {FILE}")
    return parser.parse_args(arguments)


def command(arguments: Sequence[str]) -> str:
    """The line that repeats the run; where files lie on the machine that measured is nobody's business."""
    shown = [Path(word).name if "/" in word else word for word in arguments]
    return " ".join(["python scripts/method_quality.py", *shown])


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    require_known("methods", options.methods, tuple(METHODS))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    seq_len = options.seq_len or model.config.max_position_embeddings
    texts = list(CalibrationText(path=options.data).documents())
    rows = whole_rows(texts, tokenizer, seq_len, options.rows)
    judge = Judge(
        tokenizer=tokenizer,
        tasks=[make_task(task) for task in options.tasks],
        filler=Filler.from_texts(texts, tokenizer),
        rows=rows,
        seq_len=seq_len,
        num_samples=options.samples,
        num_rows=len(rows),  # type: ignore[arg-type]
        seed=options.seed,
        batch_size=options.batch_size,
    )
    methods = {name: METHODS[name] for name in options.methods or METHODS}
    found = []
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("judging", total=len(methods) * judge.steps, figures="")
        judged = judge_methods(
            model, methods, judge, progress=lambda name: progress.update(bar, advance=1, figures=name)
        )
        for quality in judged:
            found.append(quality)
            # A run that is cut short leaves what it measured.
            write_figures(options.out / FILE, quality_figures(found, seq_len), command=command(arguments))
            result = quality.judgement
            recall = ", ".join(f"{each.task} {each.exact_match:.2f}" for each in result.recall)
            console.print(f"{quality.name}: density {quality.density:.2%}, loss {result.text_loss:.4f}, {recall}")


if __name__ == "__main__":
    main()
