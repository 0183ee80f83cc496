"""`sparse-hf export`: a run's artefact to a folder of its own, or to the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from sparse_hf.artefact import load_artefact, replace_folder
from sparse_hf.cli.output import find_artefact, write
from sparse_hf.hub import push_to_hub
from sparse_hf.model_card import CARD_FILE, write_model_card


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ARTEFACT", help="Training run, or artefact.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Hub repository to write.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of the repository to write to.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artefact in --output.")] = False,
) -> None:
    """Copy an artefact to a folder, push it to the Hub, or both."""
    if output is None and push is None:
        raise typer.BadParameter("say where to: --output DIR, --push USER/NAME, or both")
    folder = find_artefact(source)
    load_artefact(folder)
    if output is not None:
        folder = copy_artefact(folder, output, overwrite=overwrite)
        write(f"wrote {folder}")
    if push is not None:
        write(f"pushed {push_to_hub(folder, push, private=private or None, revision=revision)}")


def copy_artefact(folder: Path, output: Path, *, overwrite: bool) -> Path:
    """Copies an artefact; `output` appears whole or not at all.

    Raises:
        ValueError: if `output` lies inside the artefact, exists and `overwrite` is off, or holds something else.
        OSError: if writing fails; an old artefact is then untouched.
    """
    if folder.resolve() in output.resolve().parents:
        raise ValueError(f"{output} lies inside the artefact that it would be a copy of; choose another folder")
    with replace_folder(output, overwrite=overwrite) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        if not (staging / CARD_FILE).is_file():
            write_model_card(staging)
    return output
