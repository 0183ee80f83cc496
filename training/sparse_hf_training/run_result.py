"""What runs leave: the names in their folder, their result, and the figures of two judgements side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.figures import Figure
from sparse_hf_training.build import TrainingData
from sparse_hf_training.evaluation import Judge, Judgement, measure_kv_bytes
from sparse_hf_training.observe.summary import RunSummary
from sparse_hf_training.run_folder import from_main_process

ARTEFACT_NAME, FIGURES_NAME, HISTORY_NAME = "artefact", "figures.json", "history.json"
DATA_NAME, DATA_REPORT_NAME = "data", "data.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run left.

    Args:
        model: the sparsified model under its final head masks.
        artefact: the artefact's folder.
        scores: of the heads `[num_layers, num_kv_heads]`, or None for `sft` and `layer_selection`.
        dense, sparse: judgements of the dense model before and of the sparse one after, or None without held text.
        history: the trainer's logged rows.
        data: what was trained on.
        figures: the judgements side by side, on the main process.
        summary: the run in a table, or None where nothing was trained.
    """

    model: PreTrainedModel
    artefact: Path
    scores: Tensor | None
    dense: Judgement | None
    sparse: Judgement | None
    history: list[dict[str, float]]
    data: TrainingData
    figures: tuple[Figure, ...] = ()
    summary: RunSummary | None = None


def tell_data(data: TrainingData, output: Path, console: Console) -> None:
    """Keeps what became of the documents in the run's folder, and shows it."""
    from_main_process(lambda: data.report.write(output / DATA_REPORT_NAME))
    for line in data.report.lines():
        console.print(line, highlight=False, markup=False)


def judgement_figures(judge: Judge, before: Judgement, after: Judgement, model: PreTrainedModel) -> list[Figure]:
    """Recall, loss and KV bytes of a sparse model beside dense ones from the same run."""
    seq_len = judge.seq_len
    ids = torch.as_tensor(judge.filler.tokens[:seq_len]).long()[None].to(model.device)
    kv_bytes, dense_kv_bytes = measure_kv_bytes(model, ids)
    figures = [
        Figure(
            case=f"recall {sparse.task}, {seq_len} tokens, {sparse.num_samples} samples",
            value=sparse.exact_match,
            unit="share",
            lower_is_better=False,
            baseline=full.exact_match,
        )
        for full, sparse in zip(before.recall, after.recall, strict=True)
    ]
    loss = Figure(
        case="loss on held text",
        value=after.text_loss,
        unit="nats/token",
        lower_is_better=True,
        baseline=before.text_loss,
    )
    kv = Figure(
        case=f"KV cache at {ids.shape[1]} tokens",
        value=kv_bytes,
        unit="bytes",
        lower_is_better=True,
        baseline=dense_kv_bytes,
    )
    return [*figures, loss, kv]
