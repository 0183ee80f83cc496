"""`sparse-hf import`: masks that DuoAttention or PruLong learned, as an artefact."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig, PretrainedConfig

from sparse_hf.adapters import adapter_for_config
from sparse_hf.artefact import write_artefact
from sparse_hf.cli.output import write
from sparse_hf.interop import ImportedHeads, import_duo_attention, import_prulong


class Source(StrEnum):
    """Whose table it is."""

    duo = "duo"
    prulong = "prulong"


def import_(
    source: Annotated[Source, typer.Argument(help="Who wrote the table.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="The .tsv file, or its folder.")],
    model: Annotated[str, typer.Option(help="Model folder or Hub id; only its config.json is read.")],
    output: Annotated[Path, typer.Option(help="Artefact to write.")],
    head_sparsity: Annotated[float | None, typer.Option(help="duo: share of sparse heads, by default 0.5.")] = None,
    threshold: Annotated[float | None, typer.Option(help="duo: heads with a lower gate become sparse.")] = None,
    num_sink_tokens: Annotated[int | None, typer.Option(help="By default the table's own, or 128 (prulong).")] = None,
    window_size: Annotated[int | None, typer.Option(help="By default the table's own, or 1024 (prulong).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artefact in --output.")] = False,
) -> None:
    """Make an artefact from DuoAttention's gates or PruLong's masks."""
    config: PretrainedConfig = AutoConfig.from_pretrained(model)
    sizes = {"num_sink_tokens": num_sink_tokens, "window_size": window_size}
    given = {name: value for name, value in sizes.items() if value is not None}
    if source is Source.duo:
        heads = import_duo_attention(path, config, head_sparsity, threshold, **given)
    elif head_sparsity is not None or threshold is not None:
        raise typer.BadParameter("PruLong's masks are rounded already; --head-sparsity and --threshold are for duo")
    else:
        heads = import_prulong(path, config, **given)
    adapter = adapter_for_config(config)
    shape = adapter.shape(config)
    write_artefact(
        output,
        config=heads.config,
        head_masks=heads.head_masks,
        shape=shape,
        base_model_name_or_path=model,
        scores=heads.scores,
        training=_record(source, path, heads),
        native_windows=[adapter.native_window(config, layer) for layer in range(shape.num_layers)],
        overwrite=overwrite,
    )
    num_sparse = int((heads.head_masks == 0).sum())
    write(f"wrote {output}: {num_sparse} of {heads.head_masks.numel()} heads sparse")


def _record(source: Source, path: Path, heads: ImportedHeads) -> dict[str, Any]:
    objective = "DuoAttention, arXiv 2410.10819" if source is Source.duo else "PruLong, arXiv 2506.17121"
    sparsity = 1 - heads.head_masks.float().mean().item()
    return {"stage": "import", "objective": objective, "file": path.name, "head_sparsity": round(sparsity, 6)}
