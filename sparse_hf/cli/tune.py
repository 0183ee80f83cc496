"""`sparse-hf tune`: measures on this GPU what the kernels' tables and `min_seq_len: auto` go by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sparse_hf.break_even import FILE_NAME as BREAK_EVEN_FILE
from sparse_hf.break_even import VARIABLE as BREAK_EVEN_VARIABLE
from sparse_hf.cli.output import names, numbers, table, write, write_json
from sparse_hf.progress import progress_bar
from sparse_hf_kernels.tuned import FILE_NAME as TUNED_FILE
from sparse_hf_kernels.tuned import VARIABLE as TUNED_VARIABLE
from sparse_hf_kernels.tuned import cache_folder

if TYPE_CHECKING:
    from sparse_hf.bench.session import Absence
    from sparse_hf.tune.break_even import Measured

tune = typer.Typer(no_args_is_help=True, help="Measure on this GPU what the kernels choose by.")


@tune.callback()
def _tune() -> None:
    """Measure on this GPU what the kernels choose by. Later runs read the files that are written."""


@tune.command(epilog="Example:\n\nsparse-hf tune kernels --head-dim 128 --kind forward,backward")
def kernels(
    backend: Annotated[str | None, typer.Option(help="gluon or triton; by default the one that serves here.")] = None,
    head_dim: Annotated[str, typer.Option(help="Of 64, 128, 256, separated by commas.")] = "128,64",
    dtype: Annotated[str, typer.Option(help="Of bfloat16, float16, float32, separated by commas.")] = "bfloat16",
    kind: Annotated[str, typer.Option(help="Of forward, backward, decode, separated by commas; all by default.")] = "",
    out: Annotated[
        Path | None, typer.Option(help=f"The table; by default ${TUNED_VARIABLE}, else {TUNED_FILE} in the cache.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer candidates, shorter workloads.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the winners as JSON.")] = False,
) -> None:
    """Find the fastest tile configuration of each kernel; a candidate with another result does not count."""
    from sparse_hf.tune.kernels import described, tune_kernels, write_kernel_table
    from sparse_hf.tune.plan import KernelOptions, num_steps, plan_kernels, tuning_device

    options = KernelOptions(
        backend=backend,
        head_dims=numbers("--head-dim", head_dim),
        dtypes=names(dtype),
        kinds=names(kind),
        quick=quick,
    )
    device, clock = tuning_device()
    keys, absent = plan_kernels(options, device)
    path = _path(out, TUNED_VARIABLE, TUNED_FILE)
    results = []
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("tuning", total=num_steps(keys, options), figures="")

        def advance(text: str) -> None:
            progress.update(task, advance=1, figures=text)

        for result in tune_kernels(keys, options, device, clock, progress=advance):
            results.append(result)
            write_kernel_table(path, results)  # a run that is cut short leaves what it found
    if as_json:
        write_json([result.entry() for result in results])
    else:
        columns = ("kernel", "head_dim", "dtype", "fastest", "time against shipped", "tried", "skipped")
        rows = (
            (
                f"{result.key.backend} {result.key.kind}",
                str(result.key.head_dim),
                str(result.key.dtype).removeprefix("torch."),
                "as shipped" if result.config == result.baseline else described(result.config),
                f"{result.ratio:.3f}",
                str(result.num_tried),
                ", ".join(f"{count} {reason}" for reason, count in result.skip_counts.items()) or "none",
            )
            for result in results
        )
        write(table("Tile configurations", columns, rows))
    for text in absent:
        typer.echo(f"left out: {text}", err=True)
    typer.echo(f"wrote {path}", err=True)


@tune.command(
    "break-even", epilog="Example:\n\nsparse-hf tune break-even --method all --model-shape 32x8x128 --head-dim 64"
)
def break_even(
    model_shape: Annotated[
        list[str] | None, typer.Option(help="Query heads x KV heads x head_dim, 32x8x128 by default; repeat for more.")
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option(min=1, help="Also the first model shape with this head_dim; repeat for more.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help='Name, "all" (the default), or JSON such as {"method": "streaming", "window_size": 4096}; '
            "repeat for more."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas; by default 256 to 32768.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    out: Annotated[
        Path | None,
        typer.Option(help=f"The table; by default ${BREAK_EVEN_VARIABLE}, else {BREAK_EVEN_FILE} in the cache."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lengths as JSON.")] = False,
) -> None:
    """Find the length from which on a method is never slower than dense attention: what min_seq_len "auto" reads."""
    from sparse_hf.tune import break_even as tuner

    shapes = [_shape(text) for text in model_shape or ("32x8x128",)]
    shapes += [(*shapes[0][:2], size) for size in head_dim or ()]
    chosen = [
        tuner.BreakEvenOptions(
            methods=tuner.methods_of(method or (tuner.ALL,)),
            lengths=numbers("--lengths", lengths) or tuner.LENGTHS,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=size,
            dtype=dtype,
        )
        for num_heads, num_kv_heads, size in dict.fromkeys(shapes)
    ]
    path = _path(out, BREAK_EVEN_VARIABLE, BREAK_EVEN_FILE)
    results: list[Measured] = []
    absences: list[Absence] = []
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=sum(options.num_steps for options in chosen), figures="")

        def advance(text: str) -> None:
            progress.update(task, advance=1, figures=text)

        for options in chosen:
            session = tuner.break_even_session(options)
            results += tuner.tune_break_even(options, session, progress=advance)
            tuner.write_break_even_table(path, results)  # a run that is cut short leaves what it found
            absences += session.absences
        progress.update(task, completed=sum(options.num_steps for options in chosen))
    if as_json:
        write_json([result.entry() for result in results])
    else:
        columns = ("method", "head_dim", "break-even tokens", "time against dense", "worst as deployed")
        write(table(f"Break-even lengths, {dtype}", columns, map(_row, results)))
    for absence in dict.fromkeys(absences):
        typer.echo(f"left out: {absence.contender}: {absence.reason}", err=True)
    typer.echo(f"wrote {path}", err=True)


def _row(result: Measured) -> tuple[str, ...]:
    longest = result.options.lengths[-1]
    return (
        result.method.name,
        str(result.options.head_dim),
        f"not up to {longest}" if result.tokens is None else str(result.tokens),
        ", ".join(f"{length}: {ratio:.2f}" for length, ratio in result.ratios),
        "{1:.3f} at {0}".format(*result.worst),
    )


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--model-shape takes query heads x KV heads x head_dim, such as 32x8x128, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _path(out: Path | None, variable: str, name: str) -> Path:
    """Where a table is written, which is where it is read from later unless `out` says otherwise."""
    return out or Path(os.environ.get(variable) or cache_folder() / name)
