"""Is there any choice of heads that keeps recall? Judges every set of full heads of a size that holds given heads.

    python scripts/head_search.py --num-full 6 --always 3.1,3.3 --output docs/benchmarks/head_search.json

On the shipped 4M model; a GPU makes it minutes. The text needs no `datasets`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_hf import SparseConfig, Streaming, dense, set_head_masks, sparsify
from sparse_hf.figures import Figure, write_figures
from sparse_hf.progress import progress_bar
from sparse_hf_training.demo.recipe import ASSETS, MODEL, NUM_SINK_TOKENS, SEQ_LEN, WINDOW_SIZE
from sparse_hf_training.evaluation import evaluate_recall
from sparse_hf_training.tasks import Filler, make_task

Head = tuple[int, int]


def parse_heads(text: str) -> list[Head]:
    pairs = [part.split(".") for part in text.split(",") if part]
    return [(int(layer), int(head)) for layer, head in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-full", type=int, default=6)
    parser.add_argument("--always", type=parse_heads, default=[(3, 1), (3, 3)], help="layer.head,... kept full")
    parser.add_argument("--task", default="chain")
    parser.add_argument("--screen", type=int, default=32, help="samples for every set")
    parser.add_argument("--final", type=int, default=256, help="samples for dense and the best sets")
    parser.add_argument("--best", type=int, default=8, help="sets judged on the final samples")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()
    streaming = Streaming(num_sink_tokens=NUM_SINK_TOKENS, window_size=WINDOW_SIZE)
    sparsify(model, SparseConfig(sparse=streaming, head_masks="all_full"))
    texts = [path.read_text(encoding="utf-8") for path in sorted((ASSETS / "text" / "validation").iterdir())]
    filler, task = Filler.from_texts(texts, tokenizer), make_task(options.task)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads

    def judge(num_samples: int, seed: int) -> float:
        results = evaluate_recall(
            model,
            [task],
            filler,
            tokenizer,
            seq_len=SEQ_LEN,
            num_samples=num_samples,
            seed=seed,
            batch_size=options.batch_size,
        )
        return results[0].exact_match

    def judge_set(full: tuple[Head, ...], num_samples: int, seed: int) -> float:
        masks = torch.zeros(layers, heads, dtype=torch.long)
        for head in full:
            masks[head] = 1
        set_head_masks(model, masks)
        return judge(num_samples, seed)

    others = [head for head in itertools.product(range(layers), range(heads)) if head not in options.always]
    rest = options.num_full - len(options.always)
    sets = [(*options.always, *chosen) for chosen in itertools.combinations(others, rest)]
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task(f"judging {len(sets)} sets of {options.num_full} full heads", len(sets), figures="")
        screened = []
        for full in sets:
            screened.append((judge_set(full, options.screen, 0), full))
            progress.update(bar, advance=1, figures=f"best {max(screened)[0]:.2f}")
    screened.sort(reverse=True)
    # Other samples than those that chose them, or the best would only be the luckiest.
    final = sorted(((judge_set(full, options.final, 1), full) for _, full in screened[: options.best]), reverse=True)
    with dense(model):
        reference = judge(options.final, 1)
    share = 1 - options.num_full / (layers * heads)
    case = f"recall {options.task}, {share:.1%} of KV heads sparse, best of {len(sets)} sets of full heads"
    where = ", ".join(f"{layer}.{head}" for layer, head in sorted(final[0][1]))
    figures = [
        Figure(
            case=f"{case}, {options.final} samples ({where})",
            value=final[0][0],
            unit="share",
            lower_is_better=False,
            baseline=reference,
        ),
        Figure(
            case=f"{case}, {options.screen} samples that chose it",
            value=screened[0][0],
            unit="share",
            lower_is_better=False,
        ),
    ]
    # Where the file went on the machine that measured is nobody's business.
    arguments = [Path(word).name if word == str(options.output) else word for word in sys.argv[1:]]
    write_figures(options.output, figures, command=" ".join(["python scripts/head_search.py", *arguments]))
    for figure in figures:
        console.print(f"{figure.case}: {figure.value:.3f} (dense {figure.baseline})")


if __name__ == "__main__":
    main()
