"""What all benchmarks share: steps one after the other, each surviving the one before it, and the files of a run."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from sparse_hf.bench.plan import RunOptions
from sparse_hf.bench.report import write_csv
from sparse_hf.bench.session import DeviceLostError, Session
from sparse_hf.bench.timing import CudaClock
from sparse_hf.figures import Figure, write_figures
from sparse_hf.plots import has_matplotlib

logger = logging.getLogger(__name__)

CHAIN_CALLS = 20

Progress = Callable[[str], object]


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


@dataclass(frozen=True, kw_only=True)
class Step:
    """One case on one problem: `case` and `what` say which, `run` gives its figures."""

    case: str
    what: str
    run: Callable[[], list[Figure]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is run, and under which names it is kept.

    Args:
        name: of the files.
        options: what the user chose.
        steps: in order, on a session.
        plots: draws what a result has, with names that begin with the given path, and returns the files.
    """

    name: str
    options: RunOptions
    steps: Callable[[Session], Sequence[Step]]
    plots: Callable[[Result, Path], list[Path]]


def cuda_session(options: RunOptions) -> Session:
    """A session on the current CUDA device.

    Raises:
        ValueError: if there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs a CUDA device and torch sees none; `sparse-hf env` shows devices")
    device = torch.device("cuda")
    return Session(
        device=device,
        clock=CudaClock(device),
        chain_clock=CudaClock(device, calls=CHAIN_CALLS, flush=False),
        peers=(),
        budget_ms=options.budget_ms,
    )


def run_benchmark(
    benchmark: Benchmark,
    session: Session,
    *,
    progress: Progress = lambda text: None,
    after_step: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Runs every step. A device that breaks ends the run; what was measured before it stays.

    Args:
        benchmark: what to run.
        session: where; it collects measurements and absences.
        progress: called with a line before each step.
        after_step: called with all that was measured so far.
    """
    figures: list[Figure] = []
    broken = None
    for step in benchmark.steps(session):
        progress(f"{step.case}, {step.what}")
        try:
            figures.extend(step.run())
        except DeviceLostError as error:
            broken = str(error)
            break
        except Exception as failure:  # minutes of other cases must not be lost with this one
            logger.exception("%s, %s", step.case, step.what)
            try:
                session.failed(step.case, step.what, failure)
            except DeviceLostError as error:
                broken = str(error)
                break
        after_step(Result(figures=tuple(figures), session=session, broken=None))
    return Result(figures=tuple(figures), session=session, broken=broken)


def write_files(benchmark: Benchmark, result: Result, folder: Path) -> list[Path]:
    """Writes the figures, the measurements and the plots that can be drawn; returns what was written.

    Raises:
        ValueError: if there is no figure to write.
    """
    if not result.figures:
        reasons = [absence.reason for absence in result.session.absences]
        raise ValueError(f"nothing could be measured: {result.broken or '; '.join(dict.fromkeys(reasons))}")
    written = write_data(benchmark, result, folder)
    return [*written, *benchmark.plots(result, folder / benchmark.name)] if has_matplotlib() else written


def write_data(benchmark: Benchmark, result: Result, folder: Path) -> list[Path]:
    """Writes the figures as JSON and all measurements as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, measurements = folder / f"{benchmark.name}.json", folder / f"{benchmark.name}.csv"
    write_figures(figures, result.figures, command=benchmark.options.command(), more_software=more_software())
    write_csv(measurements, result.session)
    return [figures, measurements]


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
