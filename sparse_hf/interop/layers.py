"""What imports and exports share that go layer by layer: methods from and to a `SparseConfig`, and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from sparse_hf.adapters import ModelShape
from sparse_hf.artefact import Artefact, load_artefact
from sparse_hf.config import LayerRule, SparseConfig
from sparse_hf.head_masks import check_head_masks, keyword_head_masks
from sparse_hf.interop.tsv import shape_of
from sparse_hf.layer_ranges import format_ranges
from sparse_hf.methods import Dense, Method

ModelOrShape = PreTrainedModel | PretrainedConfig | ModelShape


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What an export starts from: the configuration, the model's shape and each KV head's method.

    Args:
        methods: `[num_layers][num_kv_heads]`.
        artefact: where it came from, if from one.
    """

    config: SparseConfig
    shape: ModelShape
    methods: list[list[Method]]
    artefact: Artefact | None = None


def resolve_source(source: str | Path | SparseConfig, model_or_shape: ModelOrShape | None) -> Resolved:
    """The methods of an artefact's folder, or of a configuration for a model.

    Raises:
        ValueError: if a configuration comes without a model, its masks lie in a file, or they do not fit the model.
    """
    if isinstance(source, SparseConfig):
        if model_or_shape is None:
            raise ValueError("a SparseConfig does not know its model; pass model_or_shape, or an artefact's folder")
        shape = shape_of(model_or_shape)
        masks = check_head_masks(keyword_head_masks(source.head_masks, shape), shape)
        return Resolved(config=source, shape=shape, methods=source.resolve(masks.tolist()))
    artefact = load_artefact(source)
    methods = artefact.config.resolve(artefact.head_masks.tolist())
    return Resolved(config=artefact.config, shape=artefact.shape, methods=methods, artefact=artefact)


def reject_min_seq_len(config: SparseConfig, format_name: str) -> None:
    """Raises ValueError if the configuration has a break-even length, which other formats do not know."""
    if config.min_seq_len:
        raise ValueError(
            f"{format_name} knows no min_seq_len, and this configuration has {config.min_seq_len!r}; set it to 0"
        )


def layer_config(methods: Sequence[Method]) -> SparseConfig:
    """The configuration in which all heads of layer l follow `methods[l]`, as sparse heads."""
    layers: dict[Method, list[int]] = {}
    for layer, method in enumerate(methods):
        layers.setdefault(method, []).append(layer)
    if len(layers) == 1:
        return SparseConfig(sparse=methods[0], head_masks="all_sparse")
    rules = tuple(
        LayerRule(layers=format_ranges(numbers), sparse=method)
        for method, numbers in layers.items()
        if not isinstance(method, Dense)
    )
    return SparseConfig(sparse=Dense(), rules=rules, head_masks="all_sparse")


def read_text(path: Path) -> str:
    """Raises ValueError if the file is missing or no text."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file") from error


def write_text(path: Path, text: str, *, overwrite: bool) -> Path:
    """Writes a file, whole or not at all.

    Raises:
        ValueError: if it exists and `overwrite` is off.
    """
    if path.exists() and (not overwrite or not path.is_file()):
        raise ValueError(f"{path} exists already; choose another name or pass overwrite=True (--overwrite)")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
