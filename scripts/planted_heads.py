"""Do recipes find heads that must retrieve? Precision and recall on models whose retrieving heads were built in.

    python scripts/planted_heads.py --out docs/benchmarks

Writes planted_heads.json. Each seed is a model of its own with two planted heads, of sixteen by default; a recipe is
asked for two full heads. Needs no data; a quarter of an hour on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sparse_hf.figures import Figure, command_line, write_figures
from sparse_hf.head_masks import round_scores
from sparse_hf.methods import Streaming
from sparse_hf.progress import progress_bar
from sparse_hf_training.evaluation.script_options import names
from sparse_hf_training.study.bench import Bench
from sparse_hf_training.study.planted import (
    average_precision,
    planted_filler,
    planted_llama,
    planted_rows,
    precision_recall,
)
from sparse_hf_training.study.recipes import PLANTED_RECIPES, RECIPES
from sparse_hf_training.tasks import CopySpanTask

FILE = "planted_heads.json"
SEQ_LEN = 320
BRANCH = Streaming(num_sink_tokens=4, window_size=32)
TASK = CopySpanTask(num_tokens=8, cue_tokens=2)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=names, default=PLANTED_RECIPES, help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, default=5, help="models")
    parser.add_argument("--steps", type=int, default=120, help="of a recipe that learns")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {FILE}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if unknown := [name for name in options.recipes if name not in RECIPES]:
        raise ValueError(f"unknown recipes {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, list[tuple[float, float, float]]] = {}
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("ranking", total=options.seeds * len(options.recipes), figures="")
        for seed in range(options.seeds):
            shape = {"num_layers": options.layers, "num_kv_heads": options.kv_heads}
            planted = planted_llama(seed, **shape)
            filler = planted_filler(seed)
            bench = Bench(
                load=lambda seed=seed, shape=shape: planted_llama(seed, **shape).model.to(device),
                tokenizer=None,
                branch=BRANCH,
                filler=filler,
                rows=planted_rows(filler, SEQ_LEN, seed=seed),
                tasks=[TASK],
                seq_len=SEQ_LEN,
                max_steps=options.steps,
                seed=seed,
            )
            model, truth = bench.model(), planted.head_masks
            sparsity = 1 - truth.float().mean().item()
            for name in options.recipes:
                progress.update(bar, figures=f"model {seed}: {name}")
                scores = RECIPES[name].rank(bench, model, sparsity).scores
                masks = round_scores(scores, sparsity)
                found.setdefault(name, []).append((*precision_recall(masks, truth), average_precision(scores, truth)))
                progress.advance(bar)
            write_figures(
                options.out / FILE, figures(found), command=command_line("python scripts/planted_heads.py", arguments)
            )
    for figure in figures(found):
        console.print(f"{figure.case}: {figure.value:.3f}", highlight=False)


def figures(found: dict[str, list[tuple[float, float, float]]]) -> list[Figure]:
    """Means over the models, per recipe."""
    columns = ("precision", "recall", "average precision")
    return [
        Figure(
            case=f"planted heads, {name}: {column}, {len(values)} models",
            value=sum(value[n] for value in values) / len(values),
            unit="share",
            lower_is_better=False,
        )
        for name, values in found.items()
        for n, column in enumerate(columns)
    ]


if __name__ == "__main__":
    main()
