"""Intervals and tests by their definitions: enumeration, simulation, and what must hold at the ends."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparse_hf_training.evaluation.statistics import (
    bootstrap_interval,
    holm,
    mcnemar_p,
    paired_counts,
    paired_difference_interval,
    wilson_interval,
)


def outcomes(both: int, one: int, other: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * one + [(False, True)] * other + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (3, 1), (5, 5), (0, 9), (7, 3)])
def test_mcnemar_counts_the_outcomes_that_are_as_unequal(one: int, other: int) -> None:
    """Each sample that only one has right is as likely to be either's: all such outcomes, one by one."""
    differing = one + other
    draws = [sum(draw) for draw in itertools.product((0, 1), repeat=differing)]
    extreme = sum(abs(2 * k - differing) >= abs(one - other) for k in draws)
    assert mcnemar_p(*outcomes(11, one, other, 4)) == pytest.approx(extreme / len(draws))
    assert mcnemar_p(*outcomes(0, one, other, 1)) == mcnemar_p(*outcomes(500, other, one, 9))


def test_pairs_are_of_the_same_samples() -> None:
    assert paired_counts(*outcomes(5, 3, 2, 1)) == (5, 3, 2, 1)
    for bad in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="same samples"):
            paired_counts(*bad)


@pytest.mark.parametrize("cells", [(0.9, 0.02, 0.06, 0.02), (0.5, 0.1, 0.2, 0.2), (0.97, 0.0, 0.03, 0.0)])
def test_the_paired_interval_covers(cells: tuple[float, ...]) -> None:
    """Of 2000 draws of 60 samples the true difference lies in 95% of the intervals, or a few more."""
    rng = np.random.default_rng(0)
    truth, covered = cells[1] - cells[2], 0
    for counts in rng.multinomial(60, cells, size=2000):
        low, high = paired_difference_interval(*outcomes(*map(int, counts)))
        covered += low - 1e-12 <= truth <= high + 1e-12
    assert 0.93 <= covered / 2000 <= 1.0


def test_the_paired_interval_is_symmetric_and_has_a_width() -> None:
    one, other = outcomes(30, 6, 2, 12)
    low, high = paired_difference_interval(one, other)
    assert low < 4 / 50 < high
    assert paired_difference_interval(other, one) == pytest.approx((-high, -low))
    perfect = [True] * 200
    low, high = paired_difference_interval(perfect, perfect)
    assert -0.03 < low < 0 < high < 0.03 and low == pytest.approx(-high)
    # The same shares, unpaired, are known less well.
    unpaired = one, [other[n - 7] for n in range(50)]
    assert sum(unpaired[1]) == sum(other)
    wide = paired_difference_interval(*unpaired)
    assert wide[1] - wide[0] > high - low


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and holm([]) == []


def test_the_bootstrap_of_means() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    low, high = bootstrap_interval(values.tolist())
    reach = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.03)
    assert bootstrap_interval(values.tolist()) == (low, high) and bootstrap_interval([1.5]) == (1.5, 1.5)
    with pytest.raises(ValueError, match="needs values"):
        bootstrap_interval([])


def test_wilson_has_a_width_at_one() -> None:
    low, high = wilson_interval(200, 200)
    assert 0.97 < low < 0.99 and high == pytest.approx(1.0)
