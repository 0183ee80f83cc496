"""Files of measured entries: new ones replace those for the same thing, the others stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_hf.figures import commit, hardware, replace_json, software
from sparse_hf_kernels.tuned import FORMAT_VERSION, read_entries


def provenance() -> dict[str, str | None]:
    """Where and with what an entry was measured."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware()
    return {"device": name, "software": software(), "commit": commit()}


def merge_entries(
    path: Path, entries: Sequence[Mapping[str, Any]], *, identity: Sequence[str], check: Callable[[Any, str], object]
) -> None:
    """Writes entries into a file beside those that it holds; the old file stays until all is written.

    Args:
        path: the file, made if it is missing.
        entries: what was measured.
        identity: the keys by which a new entry replaces an old one.
        check: raises ValueError for an entry that readers refuse, given where it stands.

    Raises:
        ValueError: if the file holds something else.
    """
    old = read_entries(path) if path.exists() else []
    merged: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate([*old, *entries]):
        check(entry, f"{path}, entry {number}" if number < len(old) else "what was measured")
        merged[json.dumps([entry[name] for name in identity], sort_keys=True)] = entry
    replace_json(path, {"format_version": FORMAT_VERSION, "entries": list(merged.values())})
