"""What commands share: pure JSON or a rich console on stdout, and how a target is found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_hf.artefact import CONFIG_FILE
from sparse_hf.hub import resolve_artefact_folder

RUN_ARTEFACT = "artefact"
"""Where a training run keeps its artefact."""


def write_json(value: Any) -> None:
    """Pure JSON on stdout, whatever the terminal."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def write(*renderables: Any) -> None:
    """Rich output on stdout; plain text where it is no terminal."""
    console = Console()
    for renderable in renderables:
        console.print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], fixed: int = 1) -> Table:
    """A left-aligned table of plain text whose first `fixed` columns are never broken."""
    result = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        result.add_column(column, overflow="fold", no_wrap=number < fixed)
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result


def names(text: str) -> tuple[str, ...]:
    """The names of an option that takes several."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of an option that takes several.

    Raises:
        ValueError: if there is something else.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def find_artefact(target: str, revision: str | None = None) -> Path:
    """The artefact's folder behind a folder, a training run's folder, or a Hub id.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(target)
    for candidate in (folder, folder / RUN_ARTEFACT):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    if folder.is_dir():
        raise ValueError(f"{target} holds no artefact: neither {CONFIG_FILE} nor {RUN_ARTEFACT}/{CONFIG_FILE} is there")
    return resolve_artefact_folder(target, revision=revision)
