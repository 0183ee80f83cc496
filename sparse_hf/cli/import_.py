"""`sparse-hf import`: what other projects learned or searched, as an artefact."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from sparse_hf.adapters import adapter_for_config
from sparse_hf.artefact import write_artefact
from sparse_hf.cli.output import write
from sparse_hf.config import SparseConfig
from sparse_hf.interop import import_duo_attention, import_minference, import_prulong, import_xattention
from sparse_hf.interop.minference import SCORES


class Source(StrEnum):
    """Whose file it is."""

    duo = "duo"
    prulong = "prulong"
    minference = "minference"
    xattention = "xattention"


_OBJECTIVES = {
    Source.duo: "DuoAttention, arXiv 2410.10819",
    Source.prulong: "PruLong, arXiv 2506.17121",
    Source.minference: "MInference, arXiv 2407.02490",
    Source.xattention: "XAttention, arXiv 2503.16428",
}
_SIZES = ("num_sink_tokens", "window_size")
_OPTIONS = {
    Source.duo: ("head_sparsity", "threshold", *_SIZES),
    Source.prulong: _SIZES,
    Source.minference: ("block_size",),
    Source.xattention: ("stride", "table", "block_size"),
}


def import_(
    source: Annotated[Source, typer.Argument(help="Who wrote the file.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="The file, or (duo, prulong) its folder.")],
    model: Annotated[str, typer.Option(help="Model folder or Hub id; only its config.json is read.")],
    output: Annotated[Path, typer.Option("--out", help="Artefact to write.")],
    head_sparsity: Annotated[float | None, typer.Option(help="duo: share of sparse heads, by default 0.5.")] = None,
    threshold: Annotated[float | None, typer.Option(help="duo: heads with a lower gate become sparse.")] = None,
    num_sink_tokens: Annotated[int | None, typer.Option(help="By default the table's own, or 128 (prulong).")] = None,
    window_size: Annotated[int | None, typer.Option(help="By default the table's own, or 1024 (prulong).")] = None,
    stride: Annotated[int | None, typer.Option(help="xattention: 4, 8 or 16; by default the table's own.")] = None,
    table: Annotated[str | None, typer.Option(help="xattention: which of several tables of the file.")] = None,
    block_size: Annotated[int | None, typer.Option(help="minference, xattention: 128 (default) or 64.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artefact in --out.")] = False,
) -> None:
    """Make an artefact of DuoAttention's gates, PruLong's masks, MInference's patterns or XAttention's thresholds."""
    settings = {
        "head_sparsity": head_sparsity,
        "threshold": threshold,
        "num_sink_tokens": num_sink_tokens,
        "window_size": window_size,
        "stride": stride,
        "table": table,
        "block_size": block_size,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    _check_options(source, given)
    config: PretrainedConfig = AutoConfig.from_pretrained(model)
    sparse, masks, scores, more = _read(source, path, config, given)
    adapter = adapter_for_config(config)
    shape = adapter.shape(config)
    masks = torch.zeros(shape.num_layers, shape.num_kv_heads, dtype=torch.long) if masks is None else masks
    sparsity = round(1 - masks.float().mean().item(), 6)
    write_artefact(
        output,
        config=sparse,
        head_masks=masks,
        shape=shape,
        base_model_name_or_path=model,
        scores=scores,
        training={
            "stage": "import",
            "objective": _OBJECTIVES[source],
            "file": path.name,
            "head_sparsity": sparsity,
            **more,
        },
        native_windows=[adapter.native_window(config, layer) for layer in range(shape.num_layers)],
        overwrite=overwrite,
    )
    num_sparse = int((masks == 0).sum())
    write(f"wrote {output}: {num_sparse} of {masks.numel()} heads sparse")


def _check_options(source: Source, given: dict[str, Any]) -> None:
    if foreign := [name for name in given if name not in _OPTIONS[source]]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        reason = "PruLong's masks are rounded already; " if source is Source.prulong else ""
        owners = ", ".join(other.value for other in Source if set(foreign) & set(_OPTIONS[other]))
        raise typer.BadParameter(f"{reason}{options} is for {owners}")


def _read(
    source: Source, path: Path, config: PretrainedConfig, given: dict[str, Any]
) -> tuple[SparseConfig, Tensor | None, Tensor | None, dict[str, Any]]:
    """Configuration, masks (None if all sparse), scores per KV head, and what else to note."""
    if source is Source.minference:
        patterns = import_minference(path, config, **given)
        return patterns.config, None, None, {SCORES: patterns.scores.tolist()}
    if source is Source.xattention:
        return import_xattention(path, config, **given), None, None, {}
    heads = (import_duo_attention if source is Source.duo else import_prulong)(path, config, **given)
    return heads.config, heads.head_masks, heads.scores, {}
