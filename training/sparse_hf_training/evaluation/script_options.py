"""What the programs under `scripts/` ask for alike, and what those load that judge methods on all heads."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparse_hf.calibrate.text import CalibrationText
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.evaluation.command import parse_tasks
from sparse_hf_training.evaluation.judge import Judge
from sparse_hf_training.evaluation.method_quality import whole_rows
from sparse_hf_training.tasks import Filler

TASKS = "needle,key_value,chain"


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def shares(text: str) -> tuple[float, ...]:
    """Percentages between commas, as shares."""
    return tuple(float(part) / 100 for part in names(text))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, and what it is judged on."""
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id")
    parser.add_argument("--data", default=str(ASSETS / "text" / "validation"), help="held text: .txt, .jsonl, .parquet")
    parser.add_argument("--seq-len", type=int, help="by default the model's context")
    parser.add_argument("--samples", type=int, default=100, help="recall samples per task")
    parser.add_argument("--batch-size", type=int, default=8, help="recall samples per forward pass")
    parser.add_argument("--rows", type=int, default=64, help="rows of text for the loss, at most")
    parser.add_argument("--tasks", default=TASKS, help="as sparse-hf eval --tasks")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Judge]:
    """The dense model, on a GPU where there is one, and what judges it.

    Raises:
        ValueError: for text or tasks that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.to(device)
    seq_len = options.seq_len or model.config.max_position_embeddings
    texts = list(CalibrationText(path=options.data).documents())
    rows = whole_rows(texts, tokenizer, seq_len, options.rows)
    tasks = parse_tasks(options.tasks)
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"--tasks must be one or more, all different, got {options.tasks!r}")
    judge = Judge(
        tokenizer=tokenizer,
        tasks=tasks,
        filler=Filler.from_texts(texts, tokenizer),
        rows=rows,
        seq_len=seq_len,
        num_samples=options.samples,
        num_rows=len(rows),  # type: ignore[arg-type]
        seed=options.seed,
        batch_size=options.batch_size,
    )
    return model, judge
