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

from rich.console import Console

from sparse_hf.bench.method_plan import METHODS
from sparse_hf.bench.plan import require_known
from sparse_hf.figures import command_line, write_figures
from sparse_hf.progress import progress_bar
from sparse_hf_training.evaluation.method_quality import judge_methods, quality_figures
from sparse_hf_training.evaluation.script_options import add_options, load, names

FILE = "method_quality.json"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--methods", type=names, default=(), help=f"of {', '.join(METHODS)}; all by default")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {FILE}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    require_known("methods", options.methods, tuple(METHODS))
    model, judge = load(options)
    methods = {name: METHODS[name] for name in options.methods or METHODS}
    command = command_line("python scripts/method_quality.py", arguments)
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
            write_figures(options.out / FILE, quality_figures(found, judge.seq_len), command=command)
            result = quality.judgement
            recall = ", ".join(f"{each.task} {each.exact_match:.2f}" for each in result.recall)
            console.print(f"{quality.name}: density {quality.density:.2%}, loss {result.text_loss:.4f}, {recall}")


if __name__ == "__main__":
    main()
