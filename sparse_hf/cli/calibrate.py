"""`sparse-hf calibrate METHOD`: a method's parameters from a model and some text, ending in an artefact."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperGroup

from sparse_hf.cli.output import table, write, write_json
from sparse_hf.cli.source import move
from sparse_hf.progress import progress_bar

if TYPE_CHECKING:
    from sparse_hf.calibrate.framework import Calibrator

_EXAMPLE = "sparse-hf calibrate {} --model meta-llama/Llama-3.1-8B --data BOOKS.parquet --seq-len 32768 --out RUN"


class CalibrateGroup(TyperGroup):
    """One command per calibration, made of its options when it is asked for; its module is not imported before."""

    def list_commands(self, ctx: Any) -> list[str]:
        from sparse_hf.calibrate.registry import available_calibrators

        return list(available_calibrators())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from sparse_hf.calibrate.registry import available_calibrators, calibrator_class

        if cmd_name not in available_calibrators():
            return None
        kind = calibrator_class(cmd_name)
        app = typer.Typer(
            add_completion=False,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        app.command(cmd_name, help=kind.summary, epilog=f"Example:\n\n{_EXAMPLE.format(cmd_name)}")(_command(kind))
        return typer.main.get_command(app)


calibrate = typer.Typer(
    cls=CalibrateGroup, no_args_is_help=True, help="Find a method's parameters for a model, from text."
)


@calibrate.callback()
def _calibrate() -> None:
    """Find a method's parameters for a model, from text. Each ends in an artefact that `sparsify` loads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The options that all calibrations have; field names are option names."""

    model: Annotated[str, typer.Option(help="Model folder or Hub id.")]
    out: Annotated[Path, typer.Option(help="Folder for the artefact and the statistics.")]
    data: Annotated[str | None, typer.Option(help="Text: .txt, .jsonl or .parquet file, folder, or Hub data set.")] = (
        None
    )
    text_column: Annotated[str, typer.Option(help="Column with the documents.")] = "text"
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train"
    num_sequences: Annotated[int, typer.Option(min=1, help="Sequences to look at.")] = 8
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence; calibrate at the length you deploy at.")] = (
        8192
    )
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; by default cuda where there is one.")] = None
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the model's own.")] = "auto"
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --out; a new target is solved from what was measured.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a calibration or artefact in --out.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False


def _command(kind: type[Calibrator]) -> Callable[..., None]:
    """The command of a calibration, with a signature made of the common options and its own."""
    common_hints = get_type_hints(Common, include_extras=True)
    own_hints = get_type_hints(kind.Options)
    common, own = dataclasses.fields(Common), dataclasses.fields(kind.Options)
    hints: dict[str, Any] = {entry.name: common_hints[entry.name] for entry in common}
    hints |= {entry.name: Annotated[own_hints[entry.name], _option(entry)] for entry in own}

    def command(**values: Any) -> None:
        options = kind.Options(**{entry.name: values.pop(entry.name) for entry in own})
        _run(kind, options, Common(**values))

    keyword, missing = inspect.Parameter.KEYWORD_ONLY, dataclasses.MISSING
    command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter(
            entry.name,
            keyword,
            default=inspect.Parameter.empty if entry.default is missing else entry.default,
            annotation=hints[entry.name],
        )
        for entry in (*common, *own)
    ])  # fmt: skip
    command.__annotations__ = {**hints, "return": None}
    return command


def _option(entry: dataclasses.Field[Any]) -> Any:
    """A flag gets one name: `--no-...` for a flag that is on by default."""
    dashed = entry.name.replace("_", "-")
    if isinstance(entry.default, bool):
        return typer.Option(f"--{dashed}/--no-{dashed}", help=entry.metadata["help"])
    return typer.Option(f"--{dashed}", help=entry.metadata["help"])


def _run(kind: type[Calibrator], options: Any, common: Common) -> None:
    """Loads model and text, calibrates with progress, shows the figures."""
    from transformers import AutoTokenizer

    from sparse_hf.calibrate.framework import Target, calibrate, check_folder, steps_done
    from sparse_hf.calibrate.text import CalibrationText, load_sequences

    check_folder(common.out, resume=common.resume, overwrite=common.overwrite)
    _check(common)
    text = CalibrationText(path=common.data, text_column=common.text_column, split=common.split)
    tokenizer = AutoTokenizer.from_pretrained(common.model)
    sequences = load_sequences(text, tokenizer, num_sequences=common.num_sequences, seq_len=common.seq_len)
    model = _load_model(common)
    calibrator = kind(options, Target.of(model, common.seq_len), common.seed)
    with progress_bar(Console(stderr=True)) as progress:
        done = steps_done(common.out) if common.resume else 0
        total = calibrator.num_passes * common.num_sequences
        task = progress.add_task(kind.name, total=total, completed=done, figures="")
        result = calibrate(
            model,
            sequences,
            calibrator,
            common.out,
            data=text.described,
            resume=common.resume,
            overwrite=common.overwrite,
            base_model_name_or_path=common.model,
            command=shlex.join(["sparse-hf", *sys.argv[1:]]),
            progress=lambda figures: progress.update(task, advance=1, figures=figures),
        )
    if common.as_json:
        write_json(result.figures)
    else:
        rows = ((row["case"], f"{row['value']:.4g}", row["unit"]) for row in result.figures)
        write(table(f"Calibration of {kind.name}", ("case", "value", "unit"), rows))
    typer.echo(f"wrote {result.folder}", err=True)


def _check(common: Common) -> None:
    """Raises ValueError for a model that is not found, an unknown dtype, or a length beyond the model's positions."""
    from transformers import AutoConfig

    if common.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {common.dtype!r}")
    try:
        config = AutoConfig.from_pretrained(common.model)
    except OSError as error:
        raise ValueError(f"model {common.model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and common.seq_len > limit:
        raise ValueError(f"--seq-len {common.seq_len} is beyond the model's {limit} positions; lower it")


def _load_model(common: Common) -> Any:
    """The model on its device.

    Raises:
        ValueError: for a device that is unknown or not there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = common.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(common.model, dtype=common.dtype)
    return move(model, device)
