"""Tables of heads as DuoAttention and PruLong write them: one row per layer, one tab-separated column per KV head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparse_hf.adapters import ModelShape, adapter_for, adapter_for_config
from sparse_hf.config import SparseConfig
from sparse_hf.methods import Dense, Method, SlidingWindow, Streaming


class ImportedHeads(NamedTuple):
    """What an import gives: `sparsify(model, heads.config)` works as it is.

    `config` holds the masks too; `head_masks` and `scores` are `[num_layers, num_kv_heads]`, scores None if binary.
    """

    config: SparseConfig
    head_masks: Tensor
    scores: Tensor | None


def shape_of(model_or_shape: PreTrainedModel | PretrainedConfig | ModelShape) -> ModelShape:
    """The attention shape of a model, of its configuration, or the shape itself.

    Raises:
        ValueError: if it is none of these, or of an unsupported family.
    """
    if isinstance(model_or_shape, ModelShape):
        return model_or_shape
    if isinstance(model_or_shape, PretrainedConfig):
        return adapter_for_config(model_or_shape).shape(model_or_shape)
    return adapter_for(model_or_shape).shape(model_or_shape.config)


def read_tsv(path: Path) -> Tensor:
    """The table as float32 `[rows, columns]`. Empty lines and lines that begin with `#` do not count.

    Raises:
        ValueError: naming the line, if a value is no finite number or a row's length differs from the first's; or if
            the file is missing, empty or no text.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file; expected tab-separated numbers") from error
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        row = [_parse(cell, f"{path}, line {number}") for cell in line.strip("\r\n").split("\t")]
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"{path}, line {number}: expected {len(rows[0])} columns as in the first row, got {len(row)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows; expected one per layer")
    return torch.tensor(rows, dtype=torch.float32)


def _parse(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError as error:
        raise ValueError(f"{where}: expected numbers separated by tabs, got {cell!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"{where}: expected finite numbers, got {cell!r}; the run that made them diverged")
    return value


def write_tsv(path: Path, values: Tensor) -> None:
    """Writes `[rows, columns]` with enough digits that `read_tsv` gives the same float32 values."""
    rows = ("\t".join(f"{value:.18e}" for value in row) for row in values.double().tolist())
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def check_table_shape(values: Tensor, shape: ModelShape, path: Path) -> None:
    """Raises ValueError unless the table is `[num_layers, num_kv_heads]` of this model."""
    expected = (shape.num_layers, shape.num_kv_heads)
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{path}: expected [layers, kv_heads] = {list(expected)} for this {shape.model_type} model, "
            f"got {list(values.shape)}; import it for the model that it was learned on"
        )


def streaming_config(masks: Tensor, num_sink_tokens: int, window_size: int) -> SparseConfig:
    """Dense and streaming heads with these masks; without sinks the sparse heads have a plain window."""
    sparse: Method = SlidingWindow(window_size=window_size)
    if num_sink_tokens:
        sparse = Streaming(num_sink_tokens=num_sink_tokens, window_size=window_size)
    return SparseConfig(full=Dense(), sparse=sparse, head_masks=tuple(map(tuple, masks.tolist())))
