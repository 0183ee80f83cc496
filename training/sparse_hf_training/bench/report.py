"""Figures of the training benchmark, with the bounds that were set beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_hf.figures import Figure
from sparse_hf_training.bench.steps import Steps

GIB = 2**30
MASK_STEP_BOUND = 1.15
SFT_BOUND, SFT_GOAL = 1.8, 2.1
ARITHMETIC_BOUND = 0.15
EFFICIENCY_BOUND = 0.85
EXCHANGE_BOUND = 0.08


def step_figures(steps: Steps, baseline: Steps | None, num_gpus: int) -> list[Figure]:
    """Tokens per second and peak memory of one case, beside those of its baseline."""
    title = case_title(steps, num_gpus)

    def rate(of: Steps) -> float:
        rows = num_gpus // of.case.seq_parallel_size  # each group of ranks that shares a row takes one
        return of.case.seq_len * rows / of.step_seconds

    return [
        Figure(
            case=f"{title}: throughput",
            value=rate(steps),
            unit="tokens/s",
            lower_is_better=False,
            baseline=None if baseline is None else rate(baseline),
        ),
        Figure(
            case=f"{title}: peak memory per GPU",
            value=steps.peak_bytes / GIB,
            unit="GiB",
            lower_is_better=True,
            baseline=None if baseline is None else baseline.peak_bytes / GIB,
        ),
    ]


def case_title(steps: Steps, num_gpus: int) -> str:
    """What the case is, but for its figure."""
    case = steps.case
    documents = "" if case.document_len is None else f" in documents of {case.document_len}"
    where = f"{num_gpus} GPU{'s' * (num_gpus > 1)}, SP {case.seq_parallel_size}"
    return f"{case.seq_len} tokens{documents}, {case.num_layers} layers, {where}, {case.name}"


def mask_step_figure(steps: Steps, dense: Steps, num_gpus: int) -> Figure:
    """A mask-learning step's time over that of a dense fine-tuning step."""
    return Figure(
        case=f"{case_title(steps, num_gpus)}: time of a dense fine-tuning step",
        value=steps.step_seconds / dense.step_seconds,
        unit="ratio",
        lower_is_better=True,
        must=MASK_STEP_BOUND,
    )


def speedup_figures(steps: Steps, dense: Steps, num_gpus: int, bounded: bool) -> list[Figure]:
    """Throughput over that of dense training, and how far it is from what arithmetic predicts at equal rates."""
    title = case_title(steps, num_gpus)
    speedup = dense.step_seconds / steps.step_seconds
    predicted = dense.case.work.total / steps.case.work.total
    return [
        Figure(
            case=f"{title}: throughput of dense training",
            value=speedup,
            unit="ratio",
            lower_is_better=False,
            must=SFT_BOUND if bounded else None,
            goal=SFT_GOAL if bounded else None,
        ),
        Figure(
            case=f"{title}: distance of that from its arithmetic",
            value=abs(speedup / predicted - 1),
            unit="share",
            lower_is_better=True,
            must=ARITHMETIC_BOUND,
        ),
    ]


def efficiency_figure(shared: Steps, alone: Steps, num_gpus: int) -> Figure:
    """Throughput of a sequence-parallel group over that of as many ranks alone, at equal work per GPU."""
    return Figure(
        case=f"{case_title(shared, num_gpus)}: efficiency against SP 1",
        value=alone.step_seconds / shared.step_seconds,
        unit="share",
        lower_is_better=False,
        must=EFFICIENCY_BOUND,
    )


def exchange_figures(steps: Steps, num_gpus: int) -> list[Figure]:
    """The share of a step that exchanges of heads take, and that in which some rank waits, for late ones included."""
    title = case_title(steps, num_gpus)
    return [
        Figure(
            case=f"{title}: exchanges of heads",
            value=steps.exchange_seconds / steps.step_seconds,
            unit="share",
            lower_is_better=True,
            must=EXCHANGE_BOUND,
        ),
        Figure(
            case=f"{title}: longest wait for exchanges and late ranks",
            value=steps.waiting_seconds / steps.step_seconds,
            unit="share",
            lower_is_better=True,
        ),
    ]


def better(first: Steps, *others: Steps) -> Steps:
    """The fastest."""
    candidates: Sequence[Steps] = (first, *others)
    return min(candidates, key=lambda steps: steps.step_seconds)
