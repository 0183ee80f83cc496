"""Trains a small Llama or Qwen3 from nothing on any text, mixed with recall tasks, so that it has retrieval heads.

    python scripts/train_small_model.py --data TEXT --out runs/small
    python scripts/train_small_model.py --family qwen3 --data TEXT --steps 6000 --seq-len 2048 --out runs/small-qwen3

One GPU, minutes; the shipped books by default. It ends with the recall of the model on held text, and leaves a folder
that every other script takes as --model. .txt and .jsonl texts need no `datasets`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console

from sparse_hf.calibrate.text import CalibrationText
from sparse_hf.progress import progress_bar
from sparse_hf_training.data import DocumentStore, text_document
from sparse_hf_training.demo.recipe import ASSETS
from sparse_hf_training.evaluation import evaluate_recall
from sparse_hf_training.evaluation.command import parse_tasks
from sparse_hf_training.study.pretrain import SmallModelConfig, pretrain, save_small_model, train_tokenizer
from sparse_hf_training.tasks import Filler, task_label

TASKS = "needle,key_value,chain,copy:num_tokens=48,niah_multiquery"
JUDGED = "needle,key_value,chain"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(SmallModelConfig):
        kind = {"str": str, "int": int, "float": float}.get(str(entry.type), str)
        parser.add_argument(f"--{entry.name.replace('_', '-')}", type=kind, default=entry.default)
    parser.add_argument("--data", default=str(ASSETS / "text" / "train"), help="text to train on")
    parser.add_argument("--held", default=str(ASSETS / "text" / "validation"), help="text to judge on")
    parser.add_argument("--tasks", default=TASKS, help="of the mixture, as sparse-hf eval --tasks")
    parser.add_argument("--judged", default=JUDGED, help="judged at the end")
    parser.add_argument("--samples", type=int, default=50, help="per task, at the end")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    config = SmallModelConfig(**{entry.name: getattr(options, entry.name) for entry in fields(SmallModelConfig)})
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} exists and is not empty; choose another --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks, judged = parse_tasks(options.tasks), parse_tasks(options.judged)
    texts = list(CalibrationText(path=options.data).documents())
    tokenizer = train_tokenizer(texts, config.vocab_size)
    documents = DocumentStore.from_documents([text_document(text, tokenizer) for text in texts])
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=config.steps, figures="")

        def show(step: int, text: float, recall: float, seconds: float) -> None:
            progress.update(bar, completed=step, figures=f"loss on text {text:.3f}, on recall {recall:.3f}")

        filler = Filler.from_texts(texts, tokenizer)
        model = pretrain(config, documents, tokenizer, filler, tasks, device, progress=show)
    held = Filler.from_texts(CalibrationText(path=options.held).documents(), tokenizer)
    results = evaluate_recall(
        model, judged, held, tokenizer, seq_len=config.seq_len, num_samples=options.samples, batch_size=8
    )
    save_small_model(model, tokenizer, options.out)
    shares = {task_label(task): result.exact_match for task, result in zip(judged, results, strict=True)}
    tokens = sum(steps * config.batch_size * config.seq_len for _, steps, _ in config.phases)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    report = {"model": str(options.out), "parameters": num_parameters, "tokens": tokens, "recall": shares}
    print(json.dumps({**report, "config": asdict(config)}, indent=2))


if __name__ == "__main__":
    main()
