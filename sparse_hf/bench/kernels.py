"""`run_kernels`: the whole kernel benchmark, from its options to its files."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

import torch

from sparse_hf.bench.cases import RUN, matmul_ceiling
from sparse_hf.bench.contenders import Contender
from sparse_hf.bench.peers import make_peers
from sparse_hf.bench.plan import Options
from sparse_hf.bench.report import plot_density, plot_lengths, write_csv
from sparse_hf.bench.session import DeviceLostError, Session
from sparse_hf.bench.timing import CudaClock
from sparse_hf.bench.workload import Shape
from sparse_hf.figures import Figure, write_figures
from sparse_hf.plots import has_matplotlib

logger = logging.getLogger(__name__)

NAME = "kernels"
CHAIN_CALLS = 20

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Figures, everything that was measured, and where a broken device ended the run, if one did."""

    figures: tuple[Figure, ...]
    session: Session
    broken: str | None

    @property
    def failed(self) -> bool:
        """The project's own operators raised or were wrong somewhere."""
        return self.broken is not None or any(absence.failed for absence in self.session.absences)


def cuda_session(options: Options) -> Session:
    """A session on the current CUDA device.

    Raises:
        ValueError: if there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("the kernel benchmark needs a CUDA device and torch sees none; `sparse-hf env` shows devices")
    device = torch.device("cuda")
    return Session(
        device=device,
        clock=CudaClock(device),
        chain_clock=CudaClock(device, calls=CHAIN_CALLS, flush=False),
        peers=(),
        budget_ms=options.budget_ms,
    )


def run_kernels(
    options: Options,
    session: Session,
    *,
    peers: Callable[[tuple[int, ...] | None], Sequence[Contender]] = make_peers,
    progress: Progress = lambda text: None,
    after_step: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Runs every step of the options. A device that breaks ends the run; what was measured before it stays.

    Args:
        options: what to run.
        session: where; it collects measurements and absences.
        peers: makes the peers, given the lengths that FlexAttention is compiled for.
        progress: called with a line before each step.
        after_step: called with all that was measured so far.
    """
    figures: list[Figure] = []

    def step(case: str, what: str, run: Callable[[], list[Figure]]) -> None:
        progress(f"{case}, {what}")
        try:
            figures.extend(run())
        except DeviceLostError:
            raise
        except Exception as failure:  # minutes of other cases must not be lost with this one
            logger.exception("%s, %s", case, what)
            session.failed(case, what, failure)
        after_step(Result(figures=tuple(figures), session=session, broken=None))

    broken = None
    try:
        step("matmul", "the ceiling", lambda: matmul_ceiling(session))
        for case, head_dim, seq_len in options.steps():
            session.peers = peers(options.flex_lengths(head_dim))
            shape = Shape(
                seq_len=seq_len, num_heads=options.num_heads, num_kv_heads=options.num_kv_heads, head_dim=head_dim
            )
            step(case, f"{seq_len} tokens, head_dim {head_dim}", partial(RUN[case], session, options, shape))
    except DeviceLostError as error:
        broken = str(error)
    return Result(figures=tuple(figures), session=session, broken=broken)


def write_result(result: Result, options: Options, folder: Path) -> list[Path]:
    """Writes kernels.json, kernels.csv and the plots that can be drawn; returns what was written.

    Raises:
        ValueError: if there is no figure to write.
    """
    if not result.figures:
        reasons = [absence.reason for absence in result.session.absences]
        raise ValueError(f"nothing could be measured: {result.broken or '; '.join(dict.fromkeys(reasons))}")
    return [*write_data(result, options, folder), *write_plots(result, folder)]


def write_data(result: Result, options: Options, folder: Path) -> list[Path]:
    """Writes kernels.json and kernels.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, measurements = folder / f"{NAME}.json", folder / f"{NAME}.csv"
    write_figures(figures, result.figures, command=options.command(), more_software=more_software())
    write_csv(measurements, result.session)
    return [figures, measurements]


def write_plots(result: Result, folder: Path) -> list[Path]:
    """Writes the plots for which there is something to show, if matplotlib is installed."""
    if not has_matplotlib():
        return []
    measurements = result.session.measurements
    return [
        path
        for head_dim in sorted({m.shape.head_dim for m in measurements})
        for name, plot in (("lengths", plot_lengths), ("density", plot_density))
        if (path := plot(folder / f"{NAME}_{name}_{head_dim}.png", measurements, head_dim))
    ]


@lru_cache(maxsize=1)
def more_software() -> tuple[str, ...]:
    """Versions that kernel times depend on, beyond those of every figure."""
    found = []
    for name in ("flash-attn-4", "nvidia-cutlass-dsl"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    if torch.backends.cudnn.is_available():
        found.append(f"cuDNN {torch.backends.cudnn.version()}")
    if path := os.environ.get("TRITON_PTXAS_PATH"):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"release [\d.]+, V([\d.]+)", said)
        found.append(f"ptxas {version[1] if version else 'of unknown version'}")
    return tuple(found)
