"""A study over several processes, spread over the GPUs there are; they share the folder of cells.

Small models leave most of a GPU idle: their time goes to the host, of which every process has its own.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from sparse_hf_training.evaluation.variant import VariantResult
from sparse_hf_training.study.study import Study, Unit

VISIBLE = "CUDA_VISIBLE_DEVICES"
_studies: list[Study] = []
"""The study of this process."""


def devices(jobs: int) -> list[str | None]:
    """The GPU of each process in turn, as `CUDA_VISIBLE_DEVICES` names it; None where there is none."""
    count = torch.cuda.device_count()
    if not count:
        return [None] * jobs
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name] or [str(n) for n in range(count)]
    return [named[n % len(named)] for n in range(jobs)]


def run_side_by_side(
    study: Study,
    jobs: int,
    *,
    deadline: float | None = None,
    progress: Callable[[Unit | None, str], None] = lambda unit, what: None,
) -> Iterator[tuple[Unit | None, VariantResult]]:
    """What `Study.run` yields, units in the order in which they are done.

    Args:
        study: this process's, which measures dense; the others get what it is made of.
        jobs: processes besides this one.
        deadline: of `time.monotonic`; after it come only units that are measured already.
        progress: called with each unit when it begins.

    Raises:
        ValueError: if `jobs` is not positive.
        BrokenProcessPool: if a process ended by itself; what was measured is in its cells.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
    make = partial(Study, study.bench, study.lab, study.plan, study.store.folder, tuning=study.tuning)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers = [Worker(place, _begin, make, threads) for place in devices(jobs)]
    try:
        waiting, running = list(study.plan.units()), dict[Future[VariantResult], tuple[Unit, Worker]]()
        _submit(study, workers, waiting, running, deadline, progress)
        yield None, study.measure_dense(progress)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                unit, worker = running.pop(future)
                workers.append(worker)
                yield unit, future.result()
            _submit(study, workers, waiting, running, deadline, progress)
    finally:
        for worker in [*workers, *(worker for _, worker in running.values())]:
            worker.pool.shutdown(cancel_futures=True)


class Worker:
    """A process with one GPU.

    Args:
        place: the GPU, as `CUDA_VISIBLE_DEVICES` names it; None where there is none.
        begin: called in the process with `arguments`, before all else.
    """

    def __init__(self, place: str | None, begin: Callable[..., None], *arguments: Any) -> None:
        self.place = place
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin, initargs=arguments)

    def submit(self, call: Callable[[Unit], VariantResult], unit: Unit) -> Future[VariantResult]:
        """The process starts with the first call. It has to be born with its GPU: libraries that it imports look for
        GPUs, and the first look counts for good."""
        if self.place is None:
            return self.pool.submit(call, unit)
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = self.place
        try:
            return self.pool.submit(call, unit)
        finally:
            if before is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = before


def _submit(
    study: Study,
    idle: list[Worker],
    waiting: list[Unit],
    running: dict[Future[VariantResult], tuple[Unit, Worker]],
    deadline: float | None,
    progress: Callable[[Unit | None, str], None],
) -> None:
    """Gives every idle process a unit, but none that would do what another process is doing."""
    while idle:
        doing = {_does(study, unit) for unit, _ in running.values()}
        late = deadline is not None and time.monotonic() >= deadline
        free = (unit for unit in waiting if _does(study, unit) not in doing)
        unit = next((unit for unit in free if not late or study.is_measured(unit)), None)
        if unit is None:
            return
        waiting.remove(unit)
        progress(unit, "begins")
        worker = idle.pop(0)
        running[worker.submit(_measure, unit)] = unit, worker


def _does(study: Study, unit: Unit) -> str:
    """What a unit still has to do first: its heads' scores, else its cells, which units with equal masks share."""
    return study.cells(unit) if study.has_scores(unit) else unit.scores


def _begin(make: Callable[[], Study], threads: int) -> None:
    torch.set_num_threads(threads)
    _studies.append(make())


def _measure(unit: Unit) -> VariantResult:
    return _studies[0].measure(unit)
