"""Tile configurations measured on the user's own GPU, which go before those that the kernels' `configs.py` ship.

`sparse-hf tune kernels` writes them. The table is read at the first launch and once: `SPARSE_HF_TUNED` names its file
(empty: none), otherwise it is `tuned.json` in the cache folder, if it is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

VARIABLE = "SPARSE_HF_TUNED"
FILE_NAME = "tuned.json"
FORMAT_VERSION = 1
REMEDY = "`sparse-hf tune kernels` writes a right one"

INTERPRETER_ARCH = 0
"""Stands for Triton's interpreter among architectures."""

ARCHES = (INTERPRETER_ARCH, 80, 89, 90, 100, 120)
HEAD_DIMS = (64, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_TILE_SIZES = (16, 32, 64, 128, 256)
_RINGS = range(2, 9)
_REGISTERS = range(24, 257, 8)
_TRITON: dict[str, Collection[int]] = {
    "rows": _TILE_SIZES,
    "columns": _TILE_SIZES,
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 9),
}
FIELDS: dict[tuple[str, str], dict[str, Collection[int]]] = {
    ("gluon", "forward"): {
        "rows": (128,),
        "columns": (32, 64, 128),
        "slots": _RINGS,
        "query_slots": (1, 2),
        "consumer_registers": _REGISTERS,
        "producer_registers": _REGISTERS,
    },
    ("gluon", "backward"): {
        "rows": (64, 128),
        "columns": (128,),
        "slots": _RINGS,
        "consumer_registers": _REGISTERS,
        "producer_registers": _REGISTERS,
    },
    **{("triton", kind): _TRITON for kind in ("forward", "decode", "dkdv", "dq")},
}
"""By backend and kind: the fields of a configuration and what the kernels can take for them."""

_KEY = ("backend", "kind", "arch", "head_dim", "dtype")
_ABOUT = ("device", "time_ms", "baseline", "baseline_ms", "workloads", "skipped", "software", "commit")

Config = tuple[tuple[str, int], ...]
"""The items of a configuration, in the order of `FIELDS`."""

T = TypeVar("T")


class Key(NamedTuple):
    """What a configuration is for; `head_dim` is that of the shipped table's row."""

    backend: str
    kind: str
    arch: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class TunedTable:
    """Configurations by key, and where they are from; the file's entries as they are."""

    source: str
    configs: Mapping[Key, Config]
    entries: tuple[Mapping[str, Any], ...] = ()


SHIPPED = TunedTable(source="shipped with the package", configs={})
"""No configuration of the user's: those of `configs.py` hold."""

_active: TunedTable | None = None


def tuned_config(key: Key, make: Callable[..., T]) -> T | None:
    """The user's configuration, or None where the shipped one holds.

    Raises:
        ValueError: at the first call, if the table cannot be read or is malformed.
    """
    found = active_table().configs.get(key)
    return None if found is None else _made(make, found)


@lru_cache
def _made(make: Callable[..., Any], config: Config) -> Any:
    return make(**dict(config))


def active_table() -> TunedTable:
    """The table in force.

    Raises:
        ValueError: if it cannot be read or is malformed.
    """
    global _active
    if _active is None:
        path = table_path()
        _active = SHIPPED if path is None else read_table(path)
    return _active


@contextmanager
def in_force(table: TunedTable | None) -> Iterator[None]:
    """Another table inside a `with` block, in all threads (autograd's too); None reads the file again."""
    global _active
    before, _active = _active, table
    try:
        yield
    finally:
        _active = before


def cache_folder() -> Path:
    """Where what was measured on this machine is kept: `$XDG_CACHE_HOME/sparse_hf`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_hf"


def user_file(variable: str, name: str, writer: str) -> Path | None:
    """The file that a variable names (empty: none), else the one of the cache folder if it is there.

    Raises:
        ValueError: if the variable names no file; `writer` is the command that writes one.
    """
    given = os.environ.get(variable)
    if given is None:
        path = cache_folder() / name
        return path if path.is_file() else None
    if not given:
        return None
    if not Path(given).is_file():
        raise ValueError(f"{variable}={given} is no file; unset it, or write the file with `{writer} --out {given}`")
    return Path(given)


def table_path() -> Path | None:
    """Where the user's table lies; None if there is none."""
    return user_file(VARIABLE, FILE_NAME, "sparse-hf tune kernels")


def read_entries(path: Path) -> list[Any]:
    """The entries of a file `{"format_version": 1, "entries": [...]}`, as they are.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # too long a number is a plain ValueError
        raise ValueError(f"{path} cannot be read as JSON ({error}); delete it or measure again") from error
    if not isinstance(document, dict) or set(document) != {"format_version", "entries"}:
        raise ValueError(f'{path} must hold exactly the keys "format_version" and "entries"; delete it, measure again')
    if document["format_version"] != FORMAT_VERSION or not isinstance(document["entries"], list):
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION} and a list of entries, got format_version "
            f"{document['format_version']!r}; delete it, measure again"
        )
    return document["entries"]


def read_table(path: Path) -> TunedTable:
    """A table from its file.

    Raises:
        ValueError: for unknown keys, missing ones or values that no kernel takes.
    """
    entries = read_entries(path)
    configs: dict[Key, Config] = {}
    for number, entry in enumerate(entries):
        key, config = checked_entry(entry, f"{path}, entry {number}")
        if key in configs:
            raise ValueError(f"{path}, entry {number}: a second one for {_KEY} = {tuple(key)}; {REMEDY}")
        configs[key] = config
    return TunedTable(source=str(path), configs=configs, entries=tuple(entries))


def checked_entry(entry: Any, where: str) -> tuple[Key, Config]:
    """Key and configuration of an entry.

    Raises:
        ValueError: as `read_table`.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: an entry is a mapping, got {entry!r}; {REMEDY}")
    _require_keys(entry, (*_KEY, "config"), _ABOUT, where)
    kinds = (entry["backend"], entry["kind"])
    if not all(isinstance(kind, str) for kind in kinds) or kinds not in FIELDS:  # JSON has values without a hash
        known = ", ".join(" ".join(kind) for kind in FIELDS)
        raise ValueError(f"{where}: unknown backend and kind {kinds!r}; known: {known}; {REMEDY}")
    arches: Collection[Any] = (90,) if entry["backend"] == "gluon" else ARCHES
    known_values: dict[str, Collection[Any]] = {"arch": arches, "head_dim": HEAD_DIMS, "dtype": DTYPES}
    for name, values in known_values.items():
        if type(entry[name]) not in (int, str) or entry[name] not in values:  # false equals 0, the interpreter
            raise ValueError(f"{where}: {name} must be one of {list(values)}, got {entry[name]!r}; {REMEDY}")
    fields, config = FIELDS[kinds], entry["config"]
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: config must be a mapping, got {config!r}; {REMEDY}")
    _require_keys(config, fields, (), f"{where}, config")
    for field, allowed in fields.items():
        value = config[field]
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            raise ValueError(f"{where}: {field} must be one of {list(allowed)}, got {value!r}; {REMEDY}")
    key = Key(entry["backend"], entry["kind"], entry["arch"], entry["head_dim"], DTYPES[entry["dtype"]])
    return key, tuple((field, config[field]) for field in fields)


def _require_keys(values: Mapping[str, Any], required: Collection[str], more: Collection[str], where: str) -> None:
    if unknown := sorted(set(values) - {*required, *more}):
        raise ValueError(f"{where}: unknown keys {unknown}; known: {[*required, *more]}; {REMEDY}")
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}: keys {missing} are missing; {REMEDY}")
