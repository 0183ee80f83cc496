"""`sparse-hf inspect`: what an artefact, a configuration or a method does at a length, from shapes or in one run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from sparse_hf.adapters import ModelShape, adapter_for_config
from sparse_hf.artefact import load_artefact
from sparse_hf.break_even import resolve_min_seq_len
from sparse_hf.cli.inspect_method import inspect_method, names_method, read_method
from sparse_hf.cli.output import find_artefact, write, write_json
from sparse_hf.cli.source import check_artefact
from sparse_hf.config import SparseConfig
from sparse_hf.head_masks import check_head_masks, keyword_head_masks
from sparse_hf.plots import plot_head_masks
from sparse_hf.sparsify import resolve_spec
from sparse_hf.summary import summarize, summary_table

DEFAULT_SEQ_LEN = 8192


class Dtype(StrEnum):
    """What keys and values are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is inspected."""

    base_model: str
    config: SparseConfig
    head_masks: Tensor
    scores: Tensor | None
    shape: ModelShape
    windows: list[int] | None
    dtype: torch.dtype


def inspect(
    target: Annotated[
        str,
        typer.Argument(help="Artefact, training run or Hub id; a method, by name or file; with --sparse a model."),
    ],
    parameters: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Parameters of a method.", show_default=False)
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each sequence; by default 8192, with --run no more than the model takes."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    sparse: Annotated[
        str | None, typer.Option(help="Preset, .json or .yaml file, artefact or Hub id to look at on the model TARGET.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the cache, with --run of all; else the model's own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of TARGET on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also write a map of heads, or of a pattern, to this image.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Read the weights, run text once, and show what attention really read.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --run: a .txt, .jsonl or .parquet file, folder or Hub data set; else the demo's books."
        ),
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Of a method: the layer's number.")] = 0,
    num_heads: Annotated[int, typer.Option(min=1, help="Of a method: query heads of the layer.")] = 32,
    num_kv_heads: Annotated[int, typer.Option(min=1, help="Of a method: KV heads of the layer.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Of a method.")] = 128,
) -> None:
    """Show head sparsity, attention density and KV bytes per layer, or what a static method keeps.

    Reads no weights, except with --run: then densities are those of a forward pass over text, per layer and query head.
    """
    if data is not None and not run:
        raise ValueError("--data is the text of a run; add --run")
    if sparse is None and names_method(target):
        if run:
            raise ValueError(f"--run needs a model: sparse-hf inspect MODEL --sparse {target} --run")
        inspect_method(
            read_method(target, parameters or ()),
            seq_len=seq_len or DEFAULT_SEQ_LEN,
            layer=layer,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=getattr(torch, dtype.value if dtype is not None else "bfloat16"),
            plot=plot,
            as_json=as_json,
        )
        return
    if parameters:
        raise ValueError(f"key=value parameters go with a method, and {target!r} is none; got {parameters}")
    if run:
        from sparse_hf.cli.inspect_run import inspect_run

        if sparse is None:
            check_artefact(target)
        inspect_run(
            target,
            sparse=sparse,
            revision=revision,
            data=data,
            seq_len=seq_len,
            batch=batch,
            dtype="auto" if dtype is None else dtype.value,
            plot=plot,
            as_json=as_json,
        )
        return
    subject = _from_artefact(target, revision) if sparse is None else _from_model(target, sparse, revision)
    element = getattr(torch, dtype.value) if dtype is not None else subject.dtype
    _inspect_shapes(target, subject, element, seq_len or DEFAULT_SEQ_LEN, batch, plot, as_json)


def _inspect_shapes(
    target: str, subject: _Subject, element: torch.dtype, seq_len: int, batch: int, plot: Path | None, as_json: bool
) -> None:
    """Prints sparsity, density and bytes by formula, and draws the head masks."""
    # As `sparsify` would resolve it on the device that this machine offers.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = resolve_min_seq_len(subject.config, device=device, head_dim=subject.shape.head_dim)
    summary = summarize(
        resolved,
        subject.head_masks,
        subject.shape,
        seq_len=seq_len,
        batch_size=batch,
        bytes_per_element=element.itemsize,
        windows=subject.windows,
    )
    if plot is not None:
        plot_head_masks(subject.head_masks, plot, subject.scores)
    name = str(element).removeprefix("torch.")
    if as_json:
        described: dict[str, Any] = {
            "target": target,
            "base_model_name_or_path": subject.base_model,
            "shape": subject.shape.to_dict(),
            "dtype": name,
            "config": {**subject.config.to_dict(), "head_masks": subject.head_masks.tolist()},
        }
        write_json({**described, **summary.to_dict()})
        return
    write(summary_table(summary, f"{subject.base_model}: {seq_len} tokens, batch {batch}, {name} cache"))
    saved = summary.dense_kv_bytes - summary.kv_bytes
    write(
        f"{summary.head_sparsity:.1%} of heads sparse, {summary.attention_density:.1%} of attention computed, "
        f"{saved / 2**20:,.1f} MiB of {summary.dense_kv_bytes / 2**20:,.1f} MiB KV cache freed"
    )


def _from_artefact(target: str, revision: str | None) -> _Subject:
    check_artefact(target)
    artefact = load_artefact(find_artefact(target, revision))
    return _Subject(
        base_model=artefact.base_model_name_or_path,
        config=artefact.config,
        head_masks=artefact.head_masks,
        scores=artefact.scores,
        shape=artefact.shape,
        windows=None if artefact.native_windows is None else list(artefact.native_windows),
        dtype=torch.bfloat16,
    )


def _from_model(target: str, spec: str, revision: str | None) -> _Subject:
    model: PretrainedConfig = AutoConfig.from_pretrained(target, revision=revision or "main")
    adapter = adapter_for_config(model)
    shape = adapter.shape(model)
    config, artefact = resolve_spec(spec)
    masks = keyword_head_masks(config.head_masks, shape) if artefact is None else artefact.head_masks
    return _Subject(
        base_model=target,
        config=config,
        head_masks=check_head_masks(masks, shape),
        scores=None if artefact is None else artefact.scores,
        shape=shape,
        windows=[adapter.native_window(model, layer) for layer in range(shape.num_layers)],
        dtype=model.dtype if isinstance(model.dtype, torch.dtype) else torch.bfloat16,
    )
