"""`sparse-hf inspect MODEL --run`: one forward pass over text, and what its attention really read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from sparse_hf.calibrate.plots import plot_maps
from sparse_hf.calibrate.text import CalibrationText, load_sequences
from sparse_hf.capture import CaptureStats, LayerStats, capture
from sparse_hf.cli.inspect import DEFAULT_SEQ_LEN
from sparse_hf.cli.output import table, write, write_json
from sparse_hf.cli.source import SparseSource
from sparse_hf.patching import get_handle
from sparse_hf.plots import require_matplotlib


def inspect_run(
    target: str,
    *,
    sparse: str | None,
    revision: str | None,
    data: str | None,
    seq_len: int | None,
    batch: int,
    dtype: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Loads a model, runs it once without gradients or logits, and prints the densities that were reached.

    Args:
        target: a model, to be made sparse as `sparse` says; without that an artefact or a training run.
        sparse, revision: as for `sparse-hf inspect`.
        data: text, as calibration takes it; by default the demo's books.
        seq_len: tokens per sequence; by default 8192, or all that the model takes if that is less.
        batch: sequences.
        dtype: of the weights, or "auto" for their own.
        plot: image for a heat map of layers and query heads.
        as_json: print JSON.

    Raises:
        ValueError: for a length beyond the model's positions, too little text, or what cannot be loaded.
    """
    if plot is not None:
        require_matplotlib()  # before the weights are read, as the rest here
    source = SparseSource.find(target, sparse, revision)
    length = _length(AutoConfig.from_pretrained(source.base, revision=source.revision), seq_len)
    text = CalibrationText(path=data)
    tokenizer = AutoTokenizer.from_pretrained(source.base, revision=source.revision)
    ids = load_sequences(text, tokenizer, num_sequences=batch, seq_len=length)
    model = source.load(dtype, "cuda" if torch.cuda.is_available() else "cpu")
    stats = run_once(model, ids)
    if plot is not None:
        plot_maps({f"density at {length} tokens": stats.density}, plot)
    if as_json:
        described = {
            "target": target,
            "data": text.described,
            "seq_len": length,
            "batch_size": batch,
            "dtype": str(model.dtype).removeprefix("torch."),
            "config": {**get_handle(model).config.to_dict(), "head_masks": get_handle(model).head_masks.tolist()},
        }
        write_json({**described, "attention_density": stats.density.mean().item(), **stats.to_dict()})
        return
    write(_table(stats, f"{target}: {text.described}, {length} tokens, batch {batch}"))
    write(f"{stats.density.mean().item():.2%} of causal pairs read, over all layers and heads")


def run_once(model: PreTrainedModel, ids: Tensor) -> CaptureStats:
    """One forward pass of a sparsified model over ids `[batch, seq_len]`."""
    with torch.inference_mode(), capture(model) as stats:
        model.eval().base_model(input_ids=ids.to(model.device), use_cache=False)
    return stats


def _length(config: PretrainedConfig, seq_len: int | None) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        return DEFAULT_SEQ_LEN if limit is None else min(DEFAULT_SEQ_LEN, limit)
    if limit is not None and seq_len > limit:
        raise ValueError(f"--seq-len {seq_len} is beyond the model's {limit} positions; lower it")
    return seq_len


def _table(stats: CaptureStats, title: str) -> Any:
    rows = [(*_figures(layer), _methods(layer)) for layer in stats.layers]
    return table(title, ("layer", "density", "least", "most", "blocks read", "query heads"), rows)


def _figures(layer: LayerStats) -> tuple[str, ...]:
    densities = [head.density for head in layer.heads]
    branches = [branch for head in layer.heads for branch in head.branches if branch.causal_blocks]
    total = sum(branch.causal_blocks or 0 for branch in branches)
    share = f"{sum(branch.kept_blocks or 0 for branch in branches) / total:.2%}" if total else "-"
    return str(layer.layer), f"{layer.density:.2%}", f"{min(densities):.2%}", f"{max(densities):.2%}", share


def _methods(layer: LayerStats) -> str:
    names = [branch.method.name for head in layer.heads for branch in head.branches]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
