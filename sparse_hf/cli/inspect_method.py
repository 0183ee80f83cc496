"""`sparse-hf inspect METHOD`: a static method's pattern at a length, as figures and as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from sparse_hf.cli.output import table, write, write_json
from sparse_hf.config import read_mapping
from sparse_hf.method_report import MethodReport, density_map, method_layout, report_method
from sparse_hf.methods import Method, available_methods, method_from_dict
from sparse_hf.plots import plot_patterns

MAX_PANELS = 4


def names_method(target: str) -> bool:
    """Whether the target is a method: a file that describes one, or a name that is no path."""
    path = Path(target)
    if path.is_file():
        return path.suffix in (".json", ".yaml", ".yml")
    return target in available_methods() and not path.exists()


def read_method(target: str, parameters: Sequence[str]) -> Method:
    """The method that a name or a file gives, with `key=value` parameters put over it.

    Raises:
        ValueError: for an unknown method or parameter, a wrong value, or a parameter that is not `key=value`.
    """
    path = Path(target)
    values = dict(read_mapping(path)) if path.is_file() else {"method": target}
    for parameter in parameters:
        key, equals, text = parameter.partition("=")
        if not equals or not key:
            raise ValueError(f"parameters are given as key=value, got {parameter!r}")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {key!r} is not understood: {text!r}") from error
    return method_from_dict(values)


def inspect_method(
    method: Method,
    *,
    seq_len: int,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Prints what a method does in one layer, and draws up to four of its distinct patterns."""
    report = report_method(
        method,
        seq_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layer=layer,
        bytes_per_element=dtype.itemsize,
    )
    if plot is not None:
        _plot(method, report, plot)
    name = str(dtype).removeprefix("torch.")
    if as_json:
        write_json({**report.to_dict(), "dtype": name})
        return
    _print(report, name)


def _plot(method: Method, report: MethodReport, path: Path) -> None:
    layout = method_layout(method, report.num_kv_heads, report.layer)
    panels = []
    for (pattern, members), head in list(zip(layout.groups, report.heads, strict=True))[:MAX_PANELS]:
        title = f"KV head {_heads(members)}: {head.density:.2%}"
        panels.append((title, density_map(layout, pattern, report.seq_len)))
    plot_patterns(panels, report.seq_len, path, title=f"{method.name}, {report.seq_len} tokens")


def _print(report: MethodReport, dtype: str) -> None:
    parameters = ", ".join(f"{key}={value}" for key, value in report.method.items() if key != "method")
    shape = f"{report.num_heads} query and {report.num_kv_heads} KV heads of {report.head_dim}, layer {report.layer}"
    rows = [
        (
            _heads(head.kv_heads),
            f"{head.stored_entries:,}",
            f"{head.density:.4%}",
            f"{head.mask_bytes:,}" if head.mask_bytes else "closed form",
            f"{head.kept_tokens:,}",
        )
        for head in report.heads
    ]
    title = f"{report.method['method']}: {report.seq_len} tokens, {shape}"
    columns = ("KV heads", "stored entries", "density", "mask bytes", "tokens in cache")
    write(parameters or "no parameters", table(title, columns, rows))
    figures: list[tuple[str, Any, Any]] = [
        ("stored entries", report.stored_entries, report.causal_entries),
        ("mask bytes", report.mask_bytes, report.dense_mask_bytes),
        (f"KV bytes ({dtype})", report.kv_bytes, report.dense_kv_bytes),
        ("FLOPs forward", report.flops, report.dense_flops),
    ]
    cells = [(name, f"{ours:,}", f"{dense:,}", f"{1 - ours / dense:.2%}") for name, ours, dense in figures]
    write(table("The layer", ("", "sparse", "dense", "saved"), cells))


def _heads(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
