"""MInference (arXiv 2407.02490): best-pattern files, a pattern per layer and query head with its search's score."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_hf.adapters import ModelShape
from sparse_hf.config import SparseConfig
from sparse_hf.interop.layers import (
    ModelOrShape,
    layer_config,
    read_text,
    reject_min_seq_len,
    resolve_source,
    write_text,
)
from sparse_hf.interop.tsv import shape_of
from sparse_hf.methods import MInference, MInferenceHead

SCORES = "pattern_scores"
"""The scores' name in an artefact's training record."""
THEIR_BLOCK_SIZE = 64
THEIR_TOP_K = 100
"""Blocks per row that the authors' block-sparse kernel takes, whatever the file says."""
ABSENT = ("vertical_and_slash", 1000, 6096, 1.0)
"""What the authors' code takes for a head that a layer leaves out."""
_KINDS = {"vertical_and_slash": "vertical_slash", "stream_llm": "a_shape", "block_sparse": "block_sparse"}


class ImportedPatterns(NamedTuple):
    """What an import gives: all heads sparse, with `MInference` by layers; `scores` fp64 `[num_layers, num_heads]`."""

    config: SparseConfig
    scores: Tensor


def import_minference(
    path: str | Path, model_or_shape: ModelOrShape, *, block_size: int = 2 * THEIR_BLOCK_SIZE
) -> ImportedPatterns:
    """A configuration from a best-pattern file: a list over layers of {"head": [type, vertical, slash, score]}.

    `vertical_and_slash` gives columns and diagonals, `stream_llm` (sinks and a window, in tokens) `a_shape`, which
    rounds up to blocks, `block_sparse` its first number as blocks of 64 per row. A head that a layer leaves out is
    (vertical_and_slash, 1000, 6096) with score 1, as in the authors' code.

    Args:
        path: the JSON file.
        model_or_shape: what the patterns are for; layers and heads are checked.
        block_size: of the method, 64 or 128; files do not know it.

    Raises:
        ValueError: if the file is missing or malformed, naming layer and head, or does not fit the model.
    """
    path, shape = Path(path), shape_of(model_or_shape)
    try:
        layers = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(layers, list) or not all(isinstance(layer, Mapping) for layer in layers):
        raise ValueError(f'{path}: expected a list over layers of {{"head": [type, vertical, slash, score]}}')
    if len(layers) != shape.num_layers:
        raise ValueError(
            f"{path}: expected {shape.num_layers} layers for this {shape.model_type} model, got {len(layers)}; import "
            "it for the model that it was searched on"
        )
    rows = [_layer(layer, number, shape, block_size, path) for number, layer in enumerate(layers)]
    scores = torch.tensor([[score for _, score in row] for row in rows], dtype=torch.float64)
    methods = [layer_method([entry for entry, _ in row], block_size) for row in rows]
    return ImportedPatterns(layer_config(methods), scores)


def layer_method(entries: Sequence[MInferenceHead], block_size: int) -> MInference:
    """One layer's method from an entry per query head; without `heads` where all are alike."""
    if len(set(entries)) == 1:
        entry = entries[0]
        return MInference(**dataclasses.asdict(entry), block_size=block_size)
    return MInference(heads=tuple(entries), block_size=block_size)


def entries_of(method: MInference, num_heads: int) -> tuple[MInferenceHead, ...]:
    """The method's entry for each query head of a layer."""
    fields = [field.name for field in dataclasses.fields(MInferenceHead)]
    return method.heads or (MInferenceHead(**{name: getattr(method, name) for name in fields}),) * num_heads


def _layer(
    layer: Mapping[str, Any], number: int, shape: ModelShape, block_size: int, path: Path
) -> list[tuple[MInferenceHead, float]]:
    known = {str(head) for head in range(shape.num_heads)}
    if unknown := sorted(set(layer) - known):
        raise ValueError(
            f"{path}, layer {number}: unknown heads {unknown[:4]}; the model has {shape.num_heads} query heads, "
            f"0 to {shape.num_heads - 1}"
        )
    return [
        _read(layer.get(str(head), ABSENT), block_size, f"{path}, layer {number}, head {head}")
        for head in range(shape.num_heads)
    ]


def _read(entry: Any, block_size: int, where: str) -> tuple[MInferenceHead, float]:
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        raise ValueError(f"{where}: expected [type, vertical, slash, score], got {entry!r}")
    kind, first, second, score = entry
    if kind not in _KINDS:
        raise ValueError(f"{where}: expected a type among {list(_KINDS)}, got {kind!r}")
    for value in (first, second):
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{where}: expected positive whole sizes, got {value!r}")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{where}: expected a finite score, got {score!r}")
    if kind == "vertical_and_slash":
        return MInferenceHead(vertical_size=first, slash_size=second), float(score)
    if kind == "stream_llm":
        return MInferenceHead(kind="a_shape", n_init=first, n_local=second), float(score)
    if first * THEIR_BLOCK_SIZE % block_size:
        raise ValueError(f"{where}: {first} blocks of 64 are no whole number of blocks of {block_size}; block_size=64")
    return MInferenceHead(kind="block_sparse", top_k=first * THEIR_BLOCK_SIZE // block_size), float(score)


def export_minference(
    source: str | Path | SparseConfig,
    out: str | Path,
    *,
    model_or_shape: ModelOrShape | None = None,
    scores: Tensor | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a best-pattern file that MInference's code loads, and `import_minference` reads back exactly.

    Sizes that an entry's kind does not use are not written. The authors' kernel takes 100 blocks of 64 in block-sparse
    heads whatever the file says; other numbers are written, with a warning.

    Args:
        source: an artefact's folder, or a configuration whose heads all follow `minference`.
        out: the JSON file.
        model_or_shape: needed with a configuration.
        scores: `[num_layers, num_heads]`; by default the artefact's, else 1.
        overwrite: replace an existing file.

    Raises:
        ValueError: if a head follows another method or an `adaptive_budget`, there is a break-even length, the scores
            do not fit, or `out` exists.
    """
    found = resolve_source(source, model_or_shape)
    reject_min_seq_len(found.config, "MInference's file")
    if scores is None and found.artefact is not None and SCORES in found.artefact.training:
        scores = torch.tensor(found.artefact.training[SCORES], dtype=torch.float64)
    shape = found.shape
    expected = (shape.num_layers, shape.num_heads)
    scores = torch.ones(expected, dtype=torch.float64) if scores is None else scores
    if tuple(scores.shape) != expected:
        raise ValueError(f"scores must be [num_layers, num_heads] = {list(expected)}, got {list(scores.shape)}")
    group = shape.num_heads // shape.num_kv_heads
    layers: list[dict[str, list[Any]]] = []
    for layer, methods in enumerate(found.methods):
        row = {}
        for head in range(shape.num_heads):
            method = methods[head // group]
            if not isinstance(method, MInference):
                raise ValueError(
                    f"MInference's file knows minference heads only; layer {layer}, head {head} follows {method.name!r}"
                )
            row[str(head)] = [*_written(method, head, layer), float(scores[layer, head])]
        layers.append(row)
    kinds = [entry for row in layers for entry in row.values() if entry[0] == "block_sparse"]
    if other := sorted({entry[1] for entry in kinds} - {THEIR_TOP_K}):
        warnings.warn(
            f"MInference's kernel takes {THEIR_TOP_K} blocks of 64 per row in block_sparse heads, not the {other} that "
            "are written",
            stacklevel=2,
        )
    return write_text(Path(out), json.dumps(layers) + "\n", overwrite=overwrite)


def _written(method: MInference, head: int, layer: int) -> tuple[str, int, int]:
    entry = entries_of(method, head + 1)[head]
    if entry.kind == "a_shape":
        return "stream_llm", entry.n_init, entry.n_local
    if entry.kind == "block_sparse":
        return "block_sparse", entry.top_k * method.block_size // THEIR_BLOCK_SIZE, 1
    if entry.adaptive_budget is not None:
        raise ValueError(
            f"MInference's file holds sizes, and layer {layer}, head {head} has an adaptive_budget of "
            f"{entry.adaptive_budget}; give vertical_size and slash_size"
        )
    return "vertical_and_slash", entry.vertical_size, entry.slash_size
