"""`sparse-hf bench`: measures on this machine what the docs say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sparse_hf.cli.output import names, numbers, table, write, write_json
from sparse_hf.progress import progress_bar

if TYPE_CHECKING:
    from sparse_hf.bench.runner import Benchmark

bench = typer.Typer(no_args_is_help=True, help="Measure kernels against what users would pick instead.")


@bench.callback()
def _bench() -> None:
    """Measure kernels against what users would pick instead."""


@bench.command(epilog="Example:\n\nsparse-hf bench kernels --cases dense-forward --seq-lens 16384,65536")
def kernels(
    cases: Annotated[str, typer.Option(help="Names, separated by commas; all by default.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths, shorter samples, no FlexAttention.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for kernels.json, kernels.csv and plots.")] = Path(
        "docs/benchmarks"
    ),
    seq_lens: Annotated[str, typer.Option(help="In place of the lengths of every case, separated by commas.")] = "",
    head_dim: Annotated[str, typer.Option(help="Head sizes, separated by commas; 128 and 64 by default.")] = "",
    heads: Annotated[int, typer.Option(min=1, help="Query heads; bounds hold for 32.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads; bounds hold for 8.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time the kernels beside SDPA, FlexAttention and flash-attn-4 in one run, each checked before it is timed."""
    from sparse_hf.bench import Options
    from sparse_hf.bench.kernels import kernel_benchmark

    options = Options(
        cases=names(cases),
        quick=quick,
        seq_lens=numbers("--seq-lens", seq_lens),
        head_dims=numbers("--head-dim", head_dim),
        num_heads=heads,
        num_kv_heads=kv_heads,
    )
    _run(kernel_benchmark(options), out, as_json)


@bench.command(epilog="Example:\n\nsparse-hf bench patterns --patterns window,triangle --seq-lens 32768,131072")
def patterns(
    patterns: Annotated[
        str, typer.Option(help="Of window, block-sparse, dilated, triangle, separated by commas; all by default.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths, shorter samples, no FlexAttention.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for patterns.json, patterns.csv and a plot.")] = Path(
        "docs/benchmarks"
    ),
    seq_lens: Annotated[str, typer.Option(help="In place of 1024 to 131072, separated by commas.")] = "",
    heads: Annotated[int, typer.Option(min=1, help="Query heads; bounds hold for 32.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads; bounds hold for 8.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of the heads; bounds hold for 128.")] = 128,
    torch_sparse_gib: Annotated[
        float, typer.Option(help="Memory that torch.sparse may take for indices and values, in GiB.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time sparse patterns beside dense SDPA, torch.sparse and FlexAttention, each checked before it is timed."""
    from sparse_hf.bench.pattern_plan import PatternOptions
    from sparse_hf.bench.patterns import pattern_benchmark

    options = PatternOptions(
        patterns=names(patterns),
        quick=quick,
        seq_lens=numbers("--seq-lens", seq_lens),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        torch_sparse_gib=torch_sparse_gib,
    )
    _run(pattern_benchmark(options), out, as_json)


@bench.command(epilog="Example:\n\nsparse-hf bench methods --methods xattention,streaming --seq-lens 32768")
def methods(
    methods: Annotated[
        str, typer.Option(help="Such as streaming or xattention, separated by commas; all by default.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="8192 and 32768 tokens only, shorter samples.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for methods.json and methods.csv.")] = Path("docs/benchmarks"),
    seq_lens: Annotated[str, typer.Option(help="In place of 8192, 32768, 131072, separated by commas.")] = "",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of the heads.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time the prefill of every method beside dense SDPA, selection included, each checked before it is timed."""
    from sparse_hf.bench.method_plan import MethodOptions
    from sparse_hf.bench.methods import method_benchmark

    options = MethodOptions(
        methods=names(methods),
        quick=quick,
        seq_lens=numbers("--seq-lens", seq_lens),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )
    _run(method_benchmark(options), out, as_json)


@bench.command("end-to-end", epilog="Example:\n\nsparse-hf bench end-to-end --cases prefill --methods triangle")
def end_to_end(
    cases: Annotated[
        str, typer.Option(help="Of prefill, cached prefill, decode, separated by commas; all by default.")
    ] = "",
    methods: Annotated[
        str, typer.Option(help="Of streaming 70%, triangle, xattention, separated by commas; all by default.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="128 to 8192 tokens only, shorter samples.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for end_to_end.json and end_to_end.csv.")] = Path("docs/benchmarks"),
    seq_lens: Annotated[str, typer.Option(help="Of prefill, in place of 128 to 32768, separated by commas.")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model, which has the shape of Llama 3.1 8B.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time a whole random model, sparsified with min_seq_len "auto", beside itself with its best SDPA."""
    from sparse_hf.bench.end_to_end import end_to_end_benchmark
    from sparse_hf.bench.end_to_end_plan import EndToEndOptions

    options = EndToEndOptions(
        cases=names(cases),
        methods=names(methods),
        quick=quick,
        seq_lens=numbers("--seq-lens", seq_lens),
        num_layers=layers,
    )
    _run(end_to_end_benchmark(options), out, as_json)


@bench.command(epilog='Example:\n\nsparse-hf bench inference --cases "first token,decode" --seq-lens 32768,131072')
def inference(
    cases: Annotated[
        str,
        typer.Option(
            help="Of short prompt, first token, prefill, decode kernel, decode, graph decode, longest context, "
            "separated by commas; all by default."
        ),
    ] = "",
    variants: Annotated[
        str,
        typer.Option(
            help="Of streaming 50%, streaming 70%, streaming 70% + xattention; by default those of each case."
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="At most 32768 tokens, batch 1, fewer rounds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for inference.json, inference.csv and a plot.")] = Path(
        "docs/benchmarks"
    ),
    seq_lens: Annotated[
        str, typer.Option(help="In place of 8192 to 131072, separated by commas; a short prompt has 2048.")
    ] = "",
    batches: Annotated[str, typer.Option(help="In place of 1 and 4, separated by commas.")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model, which has the shape of Llama 3.1 8B.")] = 32,
    memory_gib: Annotated[
        float | None, typer.Option(help="For the longest context, in GiB; by default all of the GPU's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time a long context through plain generate, with its memory: a random model, sparse beside dense."""
    from sparse_hf.bench.inference import inference_benchmark
    from sparse_hf.bench.inference_plan import InferenceOptions

    options = InferenceOptions(
        cases=names(cases),
        variants=names(variants),
        quick=quick,
        seq_lens=numbers("--seq-lens", seq_lens),
        batches=numbers("--batches", batches),
        num_layers=layers,
        memory_gib=memory_gib,
    )
    _run(inference_benchmark(options), out, as_json)


def _run(benchmark: Benchmark, out: Path, as_json: bool) -> None:
    """Runs a benchmark on the GPU with progress, writes its files and shows its figures."""
    from sparse_hf.bench.report import summary_rows
    from sparse_hf.bench.runner import cuda_session, more_software, run_benchmark, write_data, write_files
    from sparse_hf.figures import figure_rows
    from sparse_hf.plots import has_matplotlib

    options = benchmark.options
    session = cuda_session(options)
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        task = progress.add_task("measuring", total=len(benchmark.steps(session)), figures="")
        result = run_benchmark(
            benchmark,
            session,
            progress=lambda text: progress.update(task, advance=1, figures=text),
            # A run that is cut short leaves what it measured.
            after_step=lambda so_far: so_far.figures and write_data(benchmark, so_far, out),
        )
    written = write_files(benchmark, result, out)
    if as_json:
        write_json(figure_rows(result.figures, command=options.command(), more_software=more_software()))
    else:
        columns = ("case", "value", "baseline", "must", "goal", "unit", "reached")
        write(table(benchmark.name.capitalize(), columns, summary_rows(result.figures), fixed=0))
    if session.absences and not as_json:
        rows = ((absence.case, absence.contender, absence.reason) for absence in session.absences)
        write(table("Absent", ("case", "contender", "because"), rows, fixed=0))
    if result.broken:
        typer.echo(f"warning: the run ended early: {result.broken}", err=True)
    if not has_matplotlib():
        typer.echo('warning: no plots, matplotlib is not installed; pip install "sparse-hf[bench]"', err=True)
    typer.echo(f"wrote {', '.join(map(str, written))}", err=True)
    if result.failed:
        raise typer.Exit(1)
