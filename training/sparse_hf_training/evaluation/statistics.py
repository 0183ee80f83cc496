"""Intervals and tests that hold for few samples and for shares near 0 and 1.

Dense and sparse answer the same samples, so what they are compared by is paired. Shares: McNemar's exact test, which
looks at the samples where the two differ and assumes nothing of how hard samples are, and Newcombe's score interval of
the difference, which keeps a width where both are perfect (a bootstrap of 200 equal outcomes has none). Losses are no
counts; they have a bootstrap over rows.

Several runs that answer the same samples give fewer independent outcomes than they give outcomes. Counts of theirs are
divided by a design effect before an interval is formed, which makes fractions of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NORMAL_95 = 1.959964
"""Quantile of the normal distribution that 95% lie within, on both sides."""

Interval = tuple[float, float]


def design_effect(runs: Sequence[Sequence[float]]) -> float:
    """How many outcomes of several runs on the same samples tell as much as one independent outcome (Rao & Scott 1992).

    The variance of the mean with samples as clusters, one outcome of each run in a cluster, over what it would be were
    all outcomes independent: 1 if runs agree by chance alone, `num_runs` if they agree on every sample. It is held
    between these two. The variance between samples is Rao and Scott's, with num_samples / (num_samples - 1); that of
    all outcomes is divided by their number, as p(1 - p) is. Where nothing varies, or there is but one sample, nothing
    tells how far runs agree: `num_runs`, as if they were one.

    Args:
        runs: [num_runs][num_samples] outcomes, 0 or 1, or differences of two of them.

    Raises:
        ValueError: if the runs are not of the same samples, or there are none.
    """
    num_samples = {len(run) for run in runs}
    if len(num_samples) != 1 or 0 in num_samples:
        raise ValueError(f"runs must answer the same samples, got {[len(run) for run in runs]} of them")
    values = np.asarray(runs, dtype=np.float64)
    count, independent = values.shape[1], values.var()
    if count == 1 or independent == 0:
        return float(len(runs))
    effect = len(runs) * values.mean(0).var(ddof=1) / independent
    return min(max(float(effect), 1.0), float(len(runs)))


def wilson_interval(num_exact: float, num_samples: float) -> Interval:
    """95% interval of a share (Wilson 1927, score interval): right at 0 and 1, too, where the normal one has no width.

    Args:
        num_exact, num_samples: counts, of several runs on the same samples both divided by their `design_effect`.

    Raises:
        ValueError: without samples.
    """
    if num_samples <= 0:
        raise ValueError(f"an interval needs samples, got {num_samples}")
    share, z2 = num_exact / num_samples, NORMAL_95**2
    middle = share + z2 / (2 * num_samples)
    reach = NORMAL_95 * (share * (1 - share) / num_samples + z2 / (4 * num_samples**2)) ** 0.5
    low, high = ((middle + sign * reach) / (1 + z2 / num_samples) for sign in (-1, 1))
    # At 0 and 1 the share is a limit itself, which rounding would miss by a bit on its inner side.
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


def paired_counts(one: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, int, int]:
    """Samples that both have right, only `one`, only `other`, and neither.

    Raises:
        ValueError: if the two are not of the same samples, or there are none.
    """
    if len(one) != len(other) or not one:
        raise ValueError(f"paired outcomes are of the same samples, got {len(one)} and {len(other)}")
    pairs = list(zip(one, other, strict=True))
    return tuple(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))  # type: ignore[return-value]


def mcnemar_p(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test: the binomial of the samples that only one of the two has right."""
    _, only_one, only_other, _ = paired_counts(one, other)
    differing, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return min(1.0, 2 * tail)


def paired_difference_interval(one: Sequence[bool], other: Sequence[bool], *, num_runs: int = 1) -> Interval:
    """95% interval of share(one) - share(other) on the same samples (Newcombe 1998, hybrid score interval 10).

    Args:
        one, other: outcomes; those of several runs on the same samples one after the other.
        num_runs: how many these are. Counts are divided by the `design_effect` of their differences.

    Raises:
        ValueError: as `paired_counts`, or if outcomes are not of `num_runs` runs.
    """
    counts = paired_counts(one, other)
    if len(one) % num_runs:
        raise ValueError(f"outcomes are of {num_runs} runs on the same samples, got {len(one)}; give as many of each")
    effect = design_effect(np.subtract(one, other, dtype=np.float64).reshape(num_runs, -1).tolist())
    both, only_one, only_other, neither = (number / effect for number in counts)
    count = len(one) / effect
    p1, p2 = (both + only_one) / count, (both + only_other) / count
    (low1, high1), (low2, high2) = (wilson_interval(n, count) for n in (both + only_one, both + only_other))
    margins = (both + only_one) * (only_other + neither) * (both + only_other) * (only_one + neither)
    cross = both * neither - only_one * only_other
    if cross > 0:  # continuity correction
        cross = int(max(cross - count / 2, 0))
    phi = cross / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = p1 - p2
    low, high = reach(p1 - low1, high2 - p2), reach(p2 - low2, high1 - p1)
    return max(difference - low, -1.0), min(difference + high, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance that any of them is a false alarm stays below."""
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, draws: int = 10_000) -> Interval:
    """95% percentile interval of the mean of paired differences, each unit (row, sample) drawn with replacement.

    Raises:
        ValueError: without values.
    """
    if not values:
        raise ValueError("an interval needs values, got none")
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(array), size=(draws, len(array)))
    low, high = np.quantile(array[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)
