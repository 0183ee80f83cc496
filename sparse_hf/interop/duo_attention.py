"""DuoAttention (arXiv 2410.10819): `full_attention_heads.tsv`, a gate per layer and KV head, beside `config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparse_hf.adapters import ModelShape
from sparse_hf.artefact import load_artefact, replace_folder
from sparse_hf.config import SparseConfig, read_mapping
from sparse_hf.head_masks import round_scores
from sparse_hf.interop.tsv import ImportedHeads, check_table_shape, read_tsv, shape_of, streaming_config, write_tsv
from sparse_hf.methods import Dense, SlidingWindow, Streaming

TSV_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
DEFAULT_HEAD_SPARSITY = 0.5


def import_duo_attention(
    path: str | Path,
    model_or_shape: PreTrainedModel | PretrainedConfig | ModelShape,
    head_sparsity: float | None = None,
    threshold: float | None = None,
    *,
    num_sink_tokens: int | None = None,
    window_size: int | None = None,
) -> ImportedHeads:
    """A configuration from learned gates.

    Args:
        path: the pattern's folder, or its TSV.
        model_or_shape: what the pattern is for; its shape is checked.
        head_sparsity: share of heads that become sparse, those with the lowest gates; by default what
            `export_duo_attention` noted, else 0.5. Exact ties go to the earlier head, where DuoAttention draws lots.
        threshold: instead of a share, heads with a gate below it become sparse.
        num_sink_tokens: by default `sink_size` of `config.json`. Training there used larger sizes than deployment.
        window_size: by default `recent_size` of `config.json`.

    Raises:
        ValueError: if both a share and a threshold are given, the files are missing or malformed (naming the line), or
            the table does not fit the model.
    """
    if head_sparsity is not None and threshold is not None:
        raise ValueError("give head_sparsity or threshold, not both")
    shape = shape_of(model_or_shape)
    path = Path(path)
    table = path / TSV_FILE if path.is_dir() else path
    scores = read_tsv(table)
    check_table_shape(scores, shape, table)
    config_file = table.parent / CONFIG_FILE
    settings = dict(read_mapping(config_file)) if config_file.is_file() else {}
    sinks = _size(num_sink_tokens, settings, "sink_size", config_file, smallest=0)
    window = _size(window_size, settings, "recent_size", config_file, smallest=1)
    if threshold is not None:
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got NaN, which no gate reaches")
        masks = (scores >= threshold).long()
    else:
        share = settings.get("head_sparsity", DEFAULT_HEAD_SPARSITY) if head_sparsity is None else head_sparsity
        if not isinstance(share, (int, float)):
            raise ValueError(f"{config_file}: head_sparsity must be a number in [0, 1], got {share!r}")
        masks = round_scores(scores, share)
    return ImportedHeads(streaming_config(masks, sinks, window), masks, scores)


def _size(given: int | None, settings: Mapping[str, Any], key: str, path: Path, *, smallest: int) -> int:
    value = settings.get(key) if given is None else given
    if value is None:
        raise ValueError(f"{path} does not give {key!r}; pass num_sink_tokens and window_size")
    return _checked_size(value, key, smallest)


def _checked_size(value: Any, key: str, smallest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{key} must be an integer >= {smallest}, got {value!r}")
    return value


def export_duo_attention(
    source: str | Path | Tensor,
    out: str | Path,
    *,
    num_sink_tokens: int | None = None,
    window_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a pattern that DuoAttention's code loads, and `import_duo_attention` reads back exactly.

    The gates are the artefact's scores when ranking them gives its masks back, else the masks. `config.json` also notes
    the head sparsity.

    Args:
        source: an artefact's folder, or head masks `[num_layers, num_kv_heads]` of 0 and 1.
        out: the folder to write.
        num_sink_tokens, window_size: needed with bare masks; by default the artefact's.
        overwrite: replace an existing pattern's folder.

    Raises:
        ValueError: if the artefact holds what DuoAttention has no words for (another method, rules, a break-even
            length), sizes are missing or out of range, or `out` exists or holds weights.
        OSError: if writing fails; an old folder is then untouched.
    """
    scores: Tensor | None = None
    if isinstance(source, Tensor):
        masks = source.long()
        if source.ndim != 2 or not bool(((source == 0) | (source == 1)).all()):
            raise ValueError("head masks must be [num_layers, num_kv_heads] of 0 and 1")
    else:
        artefact = load_artefact(source)
        masks, scores = artefact.head_masks, artefact.scores
        sinks, window = _streaming_sizes(artefact.config)
        num_sink_tokens = sinks if num_sink_tokens is None else num_sink_tokens
        window_size = window if window_size is None else window_size
    if num_sink_tokens is None or window_size is None:
        raise ValueError("bare head masks carry no sizes; pass num_sink_tokens and window_size")
    _checked_size(num_sink_tokens, "num_sink_tokens", 0)
    _checked_size(window_size, "window_size", 1)
    head_sparsity = int((masks == 0).sum()) / masks.numel()
    exact = scores is not None and torch.equal(round_scores(scores, head_sparsity), masks)
    settings = {"sink_size": num_sink_tokens, "recent_size": window_size, "head_sparsity": head_sparsity}
    with replace_folder(Path(out), overwrite=overwrite, marker=TSV_FILE) as staging:
        write_tsv(staging / TSV_FILE, scores if exact and scores is not None else masks)
        (staging / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _streaming_sizes(config: SparseConfig) -> tuple[int, int]:
    """Sinks and window of a configuration that DuoAttention can express."""
    sparse = config.sparse
    if not isinstance(config.full, Dense) or config.rules or config.min_seq_len:
        raise ValueError(
            "DuoAttention knows dense full heads only, without rules or min_seq_len; this artefact has more"
        )
    if isinstance(sparse, Streaming):
        return sparse.num_sink_tokens, sparse.window_size
    if isinstance(sparse, SlidingWindow):
        return 0, sparse.window_size
    raise ValueError(f"DuoAttention knows streaming heads only; this artefact's sparse heads are {sparse.name!r}")
