"""The kernel benchmark: the cases of `cases.py` at the lengths of `plan.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sparse_hf.bench.cases import RUN, matmul_ceiling
from sparse_hf.bench.contenders import Contender
from sparse_hf.bench.peers import make_peers
from sparse_hf.bench.plan import Options
from sparse_hf.bench.report import plot_density, plot_lengths
from sparse_hf.bench.runner import Benchmark, Progress, Result, Step, run_benchmark, write_files
from sparse_hf.bench.session import Session
from sparse_hf.bench.workload import Shape
from sparse_hf.figures import Figure

NAME = "kernels"

Peers = Callable[[tuple[int, ...] | None], Sequence[Contender]]


def kernel_benchmark(options: Options, peers: Peers = make_peers) -> Benchmark:
    """The benchmark of these options; `peers` makes the peers, given the lengths FlexAttention is compiled for."""

    def steps(session: Session) -> list[Step]:
        def run(case: str, head_dim: int, seq_len: int) -> list[Figure]:
            session.peers = peers(options.flex_lengths(head_dim))
            shape = Shape(
                seq_len=seq_len, num_heads=options.num_heads, num_kv_heads=options.num_kv_heads, head_dim=head_dim
            )
            return RUN[case](session, options, shape)

        ceiling = Step(case="matmul", what="the ceiling", run=lambda: matmul_ceiling(session))
        planned = (
            Step(case=case, what=f"{seq_len} tokens, head_dim {head_dim}", run=partial(run, case, head_dim, seq_len))
            for case, head_dim, seq_len in options.steps()
        )
        return [ceiling, *planned]

    return Benchmark(name=NAME, options=options, steps=steps, plots=write_plots)


def run_kernels(
    options: Options,
    session: Session,
    *,
    peers: Peers = make_peers,
    progress: Progress = lambda text: None,
    after_step: Callable[[Result], object] = lambda result: None,
) -> Result:
    """`run_benchmark` of the kernel benchmark."""
    return run_benchmark(kernel_benchmark(options, peers), session, progress=progress, after_step=after_step)


def write_result(result: Result, options: Options, folder: Path) -> list[Path]:
    """`write_files` of the kernel benchmark: kernels.json, kernels.csv and plots."""
    return write_files(kernel_benchmark(options), result, folder)


def write_plots(result: Result, path: Path) -> list[Path]:
    """Writes the plots for which there is something to show."""
    measurements = result.session.measurements
    return [
        written
        for head_dim in sorted({m.shape.head_dim for m in measurements})
        for name, plot in (("lengths", plot_lengths), ("density", plot_density))
        if (written := plot(path.with_name(f"{path.name}_{name}_{head_dim}.png"), measurements, head_dim))
    ]
