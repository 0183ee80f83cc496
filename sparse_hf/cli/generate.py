"""`sparse-hf generate MODEL --sparse ARTEFACT`: what a sparse model answers, how fast, and from what."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_hf.cli.inspect import Dtype
from sparse_hf.cli.output import write_json

if TYPE_CHECKING:
    from sparse_hf.answer import Answer


def generate(
    target: Annotated[str, typer.Argument(help="Model folder or Hub id; without --sparse an artefact or run.")],
    prompt: Annotated[str | None, typer.Argument(help="By default --prompt-file, or what comes on stdin.")] = None,
    sparse: Annotated[
        str | None, typer.Option(help="Preset, .json or .yaml file, artefact, training run or Hub id.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with the prompt; - for stdin.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the tokenizer's chat template, if it has one.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dense: Annotated[bool, typer.Option("--dense", help="Then also answer with the same model, dense.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; by default their own.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cpu, ..., or auto for all GPUs; by default cuda where there is one.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of TARGET on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at the end instead of text as it comes.")] = False,
) -> None:
    """Let a sparse model answer a prompt, with times and KV bytes. On a GPU the first answer also compiles kernels."""
    text = read_prompt(prompt, prompt_file)

    import torch
    from transformers import AutoTokenizer

    from sparse_hf.answer import answer
    from sparse_hf.cli.source import SparseSource
    from sparse_hf.patching import dense as made_dense
    from sparse_hf.summary import sparsity_summary

    source = SparseSource.find(target, sparse, revision)
    tokenizer = AutoTokenizer.from_pretrained(source.base, revision=source.revision)
    inputs = encode(tokenizer, text, raw=raw)
    model = source.load(
        "auto" if dtype is None else dtype.value, device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    on_text = _printer(as_json)
    answers = {"sparse": answer(model, tokenizer, inputs, **options, on_text=on_text)}
    # The last token is never fed back: keys and values are those of all before it.
    held = answers["sparse"].prompt_tokens + answers["sparse"].new_tokens - 1
    dense_bytes = sparsity_summary(model, held).dense_kv_bytes
    if not as_json:
        _print_summary("sparse", answers["sparse"], dense_bytes)
    if dense:
        with made_dense(model):
            answers["dense"] = answer(model, tokenizer, inputs, **options, on_text=on_text)
        if not as_json:
            _print_summary("dense", answers["dense"], None)
    if as_json:
        shown: dict[str, Any] = {name: found.to_dict() for name, found in answers.items()}
        shown["sparse"]["dense_kv_bytes"] = dense_bytes
        where = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        write_json({"target": target, "base_model_name_or_path": source.base, **where, **options, **shown})


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the argument, a file, or stdin where that is no terminal.

    Raises:
        ValueError: for none, an empty one, or two.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("got a prompt and --prompt-file; give one of them")
    if prompt is not None:
        text = prompt
    elif prompt_file is not None and str(prompt_file) != "-":
        text = _read_file(prompt_file)
    elif prompt_file is None and sys.stdin.isatty():
        raise ValueError("no prompt; give it as the second argument, with --prompt-file FILE, or on stdin")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise ValueError("the prompt is empty; give it as the second argument, with --prompt-file FILE, or on stdin")
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a text file, or - for stdin") from error


def encode(tokenizer: Any, text: str, *, raw: bool) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, both `[1, tokens]`: a user's turn where there is a chat template."""
    if tokenizer.chat_template is None or raw:
        encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    else:
        turn = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _printer(as_json: bool) -> Callable[[str], object]:
    """What text is given to as it comes."""
    if as_json:
        return lambda text: None
    return lambda text: print(text, end="", flush=True)  # noqa: T201


def _print_summary(name: str, found: Answer, dense_bytes: int | None) -> None:
    """One line on stderr, so that stdout holds the answer alone."""
    speed = "" if found.tokens_per_second is None else f", then {found.tokens_per_second:,.1f} tokens/s"
    share = "" if dense_bytes is None else f", dense would hold {dense_bytes:,} ({found.kv_bytes / dense_bytes:.1%})"
    typer.echo(
        f"\n{name}: {found.prompt_tokens} prompt tokens, {found.new_tokens} new, "
        f"first token after {found.seconds_to_first_token:.2f} s{speed}; {found.kv_bytes:,} bytes of KV{share}\n",
        err=True,
    )
