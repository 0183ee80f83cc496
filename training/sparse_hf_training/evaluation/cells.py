"""Measured cells in a folder, one JSON file each, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_hf.figures import replace_json

SETTINGS_FILE = "settings.json"
CELLS_FOLDER = "cells"


class CellStore:
    """The cells of one evaluation.

    Args:
        folder: where to.
        settings: JSON-plain: everything that the cells depend on besides their own names.
        overwrite: forget what is there when it was made under other settings.

    Raises:
        ValueError: if the folder holds cells of other settings, or other files; nothing is then touched.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        path = self.folder / SETTINGS_FILE
        if path.is_file():
            before = read_json(path)
            if differ := sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k)):
                if not overwrite:
                    pairs = ", ".join(f"{k} {_short(before.get(k))} != {_short(self.settings.get(k))}" for k in differ)
                    raise ValueError(
                        f"{self.folder} holds an evaluation with other settings ({pairs}); give the same settings, "
                        "another folder, or --overwrite"
                    )
                for cell in (self.folder / CELLS_FOLDER).glob("*.json"):
                    cell.unlink()
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} holds something else than an evaluation; choose another folder")
        replace_json(path, self.settings)

    def get(self, variant: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell, from its file or measured now and written whole or not at all."""
        path = self.path(variant, name)
        if path.is_file():
            return read_json(path)
        value = measure()
        replace_json(path, value)
        return value

    def has(self, variant: str, name: str) -> bool:
        return self.path(variant, name).is_file()

    def path(self, variant: str, name: str) -> Path:
        """The cell's file; a digest keeps names apart that are alike once they are spelt for a file system."""
        text = f"{variant}--{name}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return self.folder / CELLS_FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', text)}-{digest}.json"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: if it is missing, cut short, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it is measured again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {type(value).__name__}; delete it")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
