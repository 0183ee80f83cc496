"""`sparse-hf export`: a run's artefact to a folder of its own, to the Hub, or to another project's format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig

from sparse_hf.artefact import load_artefact, replace_folder
from sparse_hf.cli.output import find_artefact, write
from sparse_hf.hub import push_to_hub
from sparse_hf.interop import (
    export_duo_attention,
    export_minference,
    export_model_optimizer,
    export_native,
    export_xattention,
)
from sparse_hf.model_card import CARD_FILE, write_model_card


class Format(StrEnum):
    """Who reads what is written."""

    artefact = "artefact"
    duo = "duo"
    minference = "minference"
    xattention = "xattention"
    modelopt = "modelopt"
    native = "native"


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ARTEFACT", help="Training run, or artefact.")],
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; a file for all but artefact, duo, native.")
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="artefact; duo: DuoAttention's folder; minference: best-pattern JSON; xattention: thresholds (.json, "
            ".py); modelopt: Model-Optimizer's sparse_attention_config; native: config.json for plain transformers."
        ),
    ] = Format.artefact,
    model: Annotated[str | None, typer.Option(help="native: the base model; by default the artefact's.")] = None,
    model_type: Annotated[str | None, typer.Option(help="native: ministral, for Llama and Mistral.")] = None,
    coefficients: Annotated[str | None, typer.Option(metavar="A,B", help="modelopt: of its calibration.")] = None,
    target_sparsity: Annotated[float | None, typer.Option(help="modelopt: share of tiles to skip.")] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Hub repository to write.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of the repository to write to.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds of the kind.")] = False,
) -> None:
    """Copy an artefact to a folder, push it to the Hub, or both; or write it for another project."""
    if output is None and (push is None or format is not Format.artefact):
        raise typer.BadParameter("say where to: --out DIR, --push USER/NAME, or both")
    _check_options(format, push, model, model_type, coefficients, target_sparsity)
    folder = find_artefact(source)
    base = load_artefact(folder).base_model_name_or_path
    if format is not Format.artefact:
        assert output is not None
        if format is Format.native:
            config = AutoConfig.from_pretrained(model or base)
            export_native(folder, output, config, model_type=model_type, overwrite=overwrite)
        elif format is Format.modelopt:
            a, b = _pair(coefficients)
            export_model_optimizer(
                folder, output, coefficients=(a, b), target_sparsity=target_sparsity, overwrite=overwrite
            )
        else:
            _WRITERS[format](folder, output, overwrite=overwrite)
        write(f"wrote {output}")
        return
    if output is not None:
        folder = copy_artefact(folder, output, overwrite=overwrite)
        write(f"wrote {folder}")
    if push is not None:
        write(f"pushed {push_to_hub(folder, push, private=private or None, revision=revision)}")


_WRITERS: dict[Format, Callable[..., Path]] = {
    Format.duo: export_duo_attention,
    Format.minference: export_minference,
    Format.xattention: export_xattention,
}


def _check_options(
    format: Format,
    push: str | None,
    model: str | None,
    model_type: str | None,
    coefficients: str | None,
    target_sparsity: float | None,
) -> None:
    if format is not Format.artefact and push is not None:
        raise typer.BadParameter("--push is for artefacts; leave --format out")
    if format is not Format.native and (model, model_type) != (None, None):
        raise typer.BadParameter("--model and --model-type are for --format native")
    if format is not Format.modelopt and (coefficients, target_sparsity) != (None, None):
        raise typer.BadParameter("--coefficients and --target-sparsity are for --format modelopt")


def _pair(text: str | None) -> tuple[float, float]:
    try:
        a, b = (float(part) for part in (text or "").split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--format modelopt needs --coefficients A,B, which Model-Optimizer's calibration prints, got {text!r}"
        ) from None
    return a, b


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
