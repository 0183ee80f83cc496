"""Is there any choice of heads that keeps recall? Judges every set of full heads of a size that holds given heads.

    python scripts/head_search.py --num-full 6 --always 3.1,3.3 --output docs/benchmarks/head_search.json
    python scripts/head_search.py --model DIR --data HELD --seq-len 8192 --window 256 --tasks key_value,chain ...

On the shipped 4M model by default; a GPU makes it minutes. .txt and .jsonl texts need no `datasets`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.calibrate.text import CalibrationText
from sparse_hf.figures import command_line, write_figures
from sparse_hf.patching import get_handle
from sparse_hf.progress import progress_bar
from sparse_hf_training.demo.recipe import ASSETS, MODEL, NUM_SINK_TOKENS, SEQ_LEN, WINDOW_SIZE
from sparse_hf_training.evaluation.command import parse_tasks
from sparse_hf_training.study.head_search import Head, HeadSearch, Judged, search_figures
from sparse_hf_training.tasks import Filler


def parse_heads(text: str) -> list[Head]:
    pairs = [part.split(".") for part in text.split(",") if part]
    return [(int(layer), int(head)) for layer, head in pairs]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id")
    parser.add_argument("--data", default=str(ASSETS / "text" / "validation"), help="held text")
    parser.add_argument("--num-full", type=int, default=6)
    parser.add_argument("--always", type=parse_heads, help="layer.head,... kept full; 3.1,3.3 on the shipped model")
    parser.add_argument("--tasks", type=parse_tasks, default="chain", help="as sparse-hf eval --tasks")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--sinks", type=int, default=NUM_SINK_TOKENS)
    parser.add_argument("--window", type=int, default=WINDOW_SIZE)
    parser.add_argument("--screen", type=int, default=32, help="samples per task for every set")
    parser.add_argument("--final", type=int, default=256, help="samples per task for dense and the best sets")
    parser.add_argument("--best", type=int, default=8, help="sets judged on the final samples")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.always is None:
        options.always = parse_heads("3.1,3.3" if options.model == str(MODEL) else "")
    return options


def prepare(options: argparse.Namespace) -> HeadSearch:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    streaming = Streaming(num_sink_tokens=options.sinks, window_size=options.window)
    sparsify(model, SparseConfig(sparse=streaming, head_masks="all_full"))
    return HeadSearch(
        model=model,
        tokenizer=tokenizer,
        tasks=options.tasks,
        filler=Filler.from_texts(list(CalibrationText(path=options.data).documents()), tokenizer),
        seq_len=options.seq_len,
        batch_size=options.batch_size,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    search = prepare(options)
    sets = search.sets(options.num_full, options.always)
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task(f"judging {len(sets)} sets of {options.num_full} full heads", len(sets), figures="")

        def show(leader: Judged) -> None:
            progress.update(bar, advance=1, figures=f"worst task of the best {leader.change:+.2f}")

        limits = {"screen": options.screen, "final": options.final}
        best, first, reference = search.best(sets, finalists=options.best, progress=show, **limits)
    num_heads = get_handle(search.model).head_masks.numel()
    figures = search_figures(best, first, reference, num_heads=num_heads, num_sets=len(sets), **limits)
    write_figures(options.output, figures, command=command_line("python scripts/head_search.py", arguments))
    for figure in figures:
        console.print(f"{figure.case}: {figure.value:.3f} (dense {figure.baseline})", highlight=False)


if __name__ == "__main__":
    main()
