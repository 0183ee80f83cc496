"""`sparse-hf serve MODEL --sparse ARTEFACT`: an OpenAI-compatible HTTP server with a sparse model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparse_hf.cli.inspect import Dtype


def serve(
    target: Annotated[str, typer.Argument(help="Model folder or Hub id; without --sparse an artefact or run.")],
    sparse: Annotated[
        str | None, typer.Option(help="Preset, .json or .yaml file, artefact, training run or Hub id.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cuda:0, cpu, ...")] = "auto",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; by default their own.")] = None,
    quantization: Annotated[str | None, typer.Option(help="bnb-4bit or bnb-8bit; needs bitsandbytes.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of TARGET on the Hub.")] = None,
    default_seed: Annotated[int | None, typer.Option(help="Of the sampling, where a request has none.")] = None,
    enable_cors: Annotated[bool, typer.Option("--enable-cors", help="Let pages of any origin ask.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Serve a sparse model over HTTP, with the server of `transformers serve`: chat, completions, responses."""
    from transformers import AutoTokenizer

    from sparse_hf.cli.source import SparseSource
    from sparse_hf.serving import serve as run_server

    options = _checked(quantization, log_level)
    source = SparseSource.find(target, sparse, revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(source.base, revision=source.revision)
    if tokenizer.chat_template is None:
        typer.echo("warning: the tokenizer has no chat template; /v1/completions works, chat requests fail", err=True)
    name = source.base if source.revision == "main" else f"{source.base}@{source.revision}"
    typer.echo(f"serving {name}, which is how requests name it, on http://{host}:{port}/v1", err=True)
    run_server(
        name,
        source.apply,
        host=host,
        port=port,
        device=device,
        dtype="auto" if dtype is None else dtype.value,
        default_seed=default_seed,
        enable_cors=enable_cors,
        **options,
    )


def _checked(quantization: str | None, log_level: str) -> dict[str, Any]:
    """Raises ValueError for what transformers would not know."""
    if quantization not in (None, "bnb-4bit", "bnb-8bit"):
        raise ValueError(f"--quantization must be bnb-4bit or bnb-8bit, got {quantization!r}")
    if log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level must be debug, info, warning or error, got {log_level!r}")
    return {"quantization": quantization, "log_level": log_level}
