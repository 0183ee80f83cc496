"""XAttention (arXiv 2503.16428): tables of thresholds, one per layer and query head, for one stride."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from sparse_hf.methods import XAttention

DEFAULT_NAME = "thresholds"
_STRIDE, _TABLE = "stride", "thresholds"


def import_xattention(
    path: str | Path,
    model_or_shape: ModelOrShape,
    *,
    stride: int | None = None,
    table: str | None = None,
    block_size: int = 128,
) -> SparseConfig:
    """A configuration from a table of thresholds, all heads sparse.

    The file holds nested lists `[num_layers][num_heads]`: JSON, alone or as {"stride": 16, "thresholds": ...}, or
    Python text, which is parsed and never run: a list, or assignments such as `llama_fuse_16 = [...]` with or without
    `torch.tensor` around it.

    Args:
        path: the file.
        model_or_shape: what the table is for; its shape is checked.
        stride: 4, 8 or 16. By default what the file says, or the number at the end of the table's name.
        table: which of several tables; by default the one whose name ends in the stride.
        block_size: of the method, 64 or 128; tables do not know it.

    Raises:
        ValueError: if the file is missing or malformed, holds several tables and none is named, its stride is
            contradicted or missing, a threshold is no number in [0, 1], or it does not fit the model.
    """
    path, shape = Path(path), shape_of(model_or_shape)
    tables, known_stride = _read_tables(path)
    name = _choose(tables, table, stride, path)
    ending = re.search(r"_(\d+)$", name)
    known_stride = int(ending[1]) if known_stride is None and ending else known_stride
    if known_stride is None:
        if stride is None:
            raise ValueError(f"{path} does not say its stride; pass stride (--stride): 4, 8 or 16")
        known_stride = stride
    if stride not in (None, known_stride):
        raise ValueError(f"{path}: the table {name!r} is for stride {known_stride}, not {stride}")
    rows = tables[name]
    expected = (shape.num_layers, shape.num_heads)
    if not isinstance(rows, list) or len(rows) != expected[0]:
        got = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"{path}: expected [layers, heads] = {list(expected)}, got {got} rows")
    methods = []
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != expected[1]:
            got = len(row) if isinstance(row, list) else type(row).__name__
            raise ValueError(f"{path}, layer {layer}: expected {expected[1]} thresholds, one per query head, got {got}")
        values = tuple(_share(value, f"{path}, layer {layer}, head {head}") for head, value in enumerate(row))
        threshold = values[0] if len(set(values)) == 1 else values
        methods.append(XAttention(stride=known_stride, threshold=threshold, block_size=block_size))
    return layer_config(methods)


def _share(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 or math.isnan(value):
        raise ValueError(f"{where}: expected a threshold in [0, 1], got {value!r}")
    return float(value)


def _choose(tables: Mapping[str, Any], table: str | None, stride: int | None, path: Path) -> str:
    if table is not None:
        if table not in tables:
            raise ValueError(f"{path} has no table {table!r}; it has {list(tables)}")
        return table
    names = list(tables)
    if len(names) > 1 and stride is not None:
        names = [name for name in names if name.endswith(f"_{stride}")]
    if len(names) != 1:
        raise ValueError(f"{path} holds the tables {list(tables)}; name one (--table), or a stride that one ends in")
    return names[0]


def _read_tables(path: Path) -> tuple[dict[str, Any], int | None]:
    """Tables by name, and the stride if the file says it."""
    text = read_text(path)
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(found, Mapping):
            return {DEFAULT_NAME: found}, None
        if set(found) != {_STRIDE, _TABLE}:
            raise ValueError(f"{path}: expected a list or the keys {[_STRIDE, _TABLE]}, got {sorted(found)}")
        return {DEFAULT_NAME: found[_TABLE]}, found[_STRIDE]
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is neither JSON (.json) nor lists in Python's notation: {error}") from error
    tables: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif isinstance(node, ast.Expr):
            name, value = DEFAULT_NAME, node.value
        else:
            continue
        if isinstance(value, ast.Call) and value.args:  # torch.tensor([...]), torch.Tensor([...])
            value = value.args[0]
        if isinstance(value, ast.List):
            try:
                tables[name] = ast.literal_eval(value)
            except ValueError as error:
                raise ValueError(f"{path}: the table {name!r} holds more than numbers: {error}") from error
    if not tables:
        raise ValueError(f"{path} holds no table; expected nested lists [layers][heads] of thresholds")
    return tables, None


def export_xattention(
    source: str | Path | SparseConfig,
    out: str | Path,
    *,
    model_or_shape: ModelOrShape | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a table that `import_xattention` reads back exactly.

    A `.py` file holds `thresholds_16 = [...]` for stride 16, which XAttention's code takes in place of `llama_fuse_16`;
    a `.json` file {"stride": 16, "thresholds": [...]}.

    Args:
        source: an artefact's folder, or a configuration whose heads all follow `xattention` with one stride.
        out: the file, `.py` or `.json`.
        model_or_shape: needed with a configuration.
        overwrite: replace an existing file.

    Raises:
        ValueError: if a head follows another method or a `sparsity_ratio`, strides differ, there is a break-even
            length, `out` exists, or has another suffix.
    """
    out = Path(out)
    if out.suffix not in (".py", ".json"):
        raise ValueError(f"a table of thresholds is a .json or .py file, got {out.name!r}")
    found = resolve_source(source, model_or_shape)
    reject_min_seq_len(found.config, "a table of thresholds")
    group = found.shape.num_heads // found.shape.num_kv_heads
    rows: list[list[float]] = []
    strides = set()
    for layer, methods in enumerate(found.methods):
        row = []
        for head in range(found.shape.num_heads):
            method = methods[head // group]
            if not isinstance(method, XAttention) or method.sparsity_ratio is not None:
                what = "a sparsity_ratio" if isinstance(method, XAttention) else repr(method.name)
                raise ValueError(f"a table holds thresholds only; layer {layer}, head {head} follows {what}")
            row.append(float(method.threshold[head] if isinstance(method.threshold, tuple) else method.threshold))
            strides.add(method.stride)
        rows.append(row)
    if len(strides) > 1:
        raise ValueError(f"a table is for one stride, and the layers have {sorted(strides)}; export them apart")
    stride = strides.pop()
    if out.suffix == ".json":
        return write_text(out, json.dumps({_STRIDE: stride, _TABLE: rows}) + "\n", overwrite=overwrite)
    lines = ",\n".join(f"    {row!r}" for row in rows)
    return write_text(out, f"{DEFAULT_NAME}_{stride} = [\n{lines},\n]\n", overwrite=overwrite)
