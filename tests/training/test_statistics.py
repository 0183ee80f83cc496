"""Intervals and tests by their definitions: enumeration, simulation, and what must hold at the ends."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparse_hf_training.evaluation.statistics import (
    bootstrap_interval,
    design_effect,
    holm,
    mcnemar_p,
    paired_counts,
    paired_difference_interval,
    wilson_interval,
)

NUM_SEEDS = 3


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


@pytest.mark.parametrize("count", [1, 4, 24, 40, 69, 200])  # rounding put the limit on the wrong side of most of these
def test_a_share_lies_within_its_interval(count: int) -> None:
    for exact in (0, count // 2, count):
        low, high = wilson_interval(exact, count)
        assert 0 <= low <= exact / count <= high <= 1


def seeds_of_samples(rng: np.random.Generator, chances: np.ndarray) -> list[list[bool]]:
    """[NUM_SEEDS][num_samples] outcomes, of samples that are answered with these chances."""
    return (rng.random((NUM_SEEDS, len(chances))) < chances).tolist()  # type: ignore[no-any-return]


def share_interval(runs: list[list[bool]], effect: float) -> tuple[float, float]:
    num_exact, num_outcomes = sum(map(sum, runs)), sum(map(len, runs))
    return wilson_interval(num_exact / effect, num_outcomes / effect)


def difference_interval(runs: list[list[bool]], dense: list[bool], *, pooled: bool = False) -> tuple[float, float]:
    every = [right for run in runs for right in run]
    return paired_difference_interval(every, dense * len(runs), num_runs=1 if pooled else len(runs))


def test_the_design_effect_by_hand() -> None:
    # Means of samples 1, 1/2, 1/2, 0: variance 1/6 between them, where 1/4 / 2 is expected of independent outcomes.
    assert design_effect([[1, 1, 0, 0], [1, 0, 1, 0]]) == pytest.approx((1 / 6) / (1 / 4 / 2))
    # Differences -1, -1/2, 0, 0, 1/2: variance 13/40 between them, 9/25 of all ten.
    assert design_effect([[-1, -1, 0, 0, 1], [-1, 0, 0, 0, 0]]) == pytest.approx((13 / 40) / (9 / 25 / 2))
    assert design_effect([[1, 0, 1, 0], [0, 1, 0, 1]]) == 1.0, "runs that differ more than by chance"
    assert design_effect([[1], [0], [0]]) == 3.0, "one sample does not tell"
    for bad in ([[1, 0], [1]], [[], []], []):
        with pytest.raises(ValueError, match="runs must answer the same samples"):
            design_effect(bad)


@pytest.mark.parametrize("correlation", [0.0, 0.25, 0.5, 1.0])
def test_the_design_effect_is_that_of_the_correlation_between_runs(correlation: float) -> None:
    """1 + (num_runs - 1) * correlation of two outcomes on one sample."""
    rng = np.random.default_rng(0)
    num_samples = 20_000
    if correlation == 0:
        chances = np.full(num_samples, 0.7)
    elif correlation == 1:
        chances = (rng.random(num_samples) < 0.7).astype(float)
    else:
        total = 1 / correlation - 1  # chances of a beta make outcomes correlate by 1 / (a + b + 1)
        chances = rng.beta(0.7 * total, 0.3 * total, num_samples)
    assert design_effect(seeds_of_samples(rng, chances)) == pytest.approx(1 + (NUM_SEEDS - 1) * correlation, abs=0.03)


def test_paired_counts_are_divided_by_the_design_effect_of_the_differences() -> None:
    """Which widens the interval by its square root."""
    dense = [True, True, True, False] * 30
    runs = [[True, True, False, False] * 30, [True, False, False, True] * 30]
    # Of 120 samples means 0, -1/2, -1 and 1/2; differences 0, 0, -1, 0 and 0, -1, -1, 1.
    effect = design_effect([[0, 0, -1, 0] * 30, [0, -1, -1, 1] * 30])
    assert effect == pytest.approx(2 * (5 / 16) * (120 / 119) / (7 / 16))
    low, high = difference_interval(runs, dense)
    ends = difference_interval(runs, dense, pooled=True)
    assert (high - low) / (ends[1] - ends[0]) == pytest.approx(math.sqrt(effect), rel=0.02)
    with pytest.raises(ValueError, match="of 7 runs on the same samples, got 240"):
        paired_difference_interval(runs[0] * 2, dense * 2, num_runs=7)


def test_one_run_has_the_intervals_of_its_counts() -> None:
    """To the last bit those of before there were design effects, written down from then."""
    one, other = outcomes(170, 11, 6, 14)
    assert design_effect([one]) == design_effect([[1, 1, 1]]) == design_effect([[-1, 0, 1]]) == 1.0
    assert share_interval([one], 1.0) == wilson_interval(181, 201) == (0.8513126291872358, 0.9346610739843386)
    difference = (-0.017618915863890708, 0.0690725113951399)
    assert difference_interval([one], other) == paired_difference_interval(one, other) == difference


@pytest.mark.parametrize("cells", [(170, 11, 6, 14), (3, 4, 1, 3), (20, 0, 0, 0), (0, 0, 9, 0), (5, 0, 0, 4)])
def test_runs_that_agree_on_every_sample_are_one(cells: tuple[int, int, int, int]) -> None:
    """Shares of 0 and 1 and differences that are all alike among them, which keep the width of one run."""
    one, other = outcomes(*cells)
    runs = [one] * NUM_SEEDS
    assert design_effect(runs) == NUM_SEEDS
    assert share_interval(runs, design_effect(runs)) == wilson_interval(sum(one), len(one))
    interval = difference_interval(runs, other)
    assert interval == paired_difference_interval(one, other) and interval[1] - interval[0] > 0.01


def test_runs_that_agree_by_chance_are_as_good_as_more_samples() -> None:
    rng = np.random.default_rng(0)
    dense = [True] * 300
    for _ in range(20):
        runs = seeds_of_samples(rng, np.full(300, 0.8))
        for found, pooled in (
            (share_interval(runs, design_effect(runs)), share_interval(runs, 1.0)),
            (difference_interval(runs, dense), difference_interval(runs, dense, pooled=True)),
        ):
            assert found == pytest.approx(pooled, abs=0.008)
            assert found[0] <= pooled[0] and found[1] >= pooled[1], "never narrower"


@pytest.mark.parametrize("num_samples", [24, 200])
def test_intervals_over_runs_cover(num_samples: int) -> None:
    """Samples differ in how hard they are, so that runs agree more than by chance: one interval of 20 misses, as it
    should, where one that takes all outcomes for independent misses more than twice as often."""
    rng = np.random.default_rng(0)
    a, b, harder, draws = 0.6, 0.4, 0.7, 1500  # sparse is right `harder` times as often as dense
    covered = dict.fromkeys(("share", "share, pooled", "difference", "difference, pooled"), 0)
    for _ in range(draws):
        easy = rng.beta(a, b, num_samples)
        dense, runs = (rng.random(num_samples) < easy).tolist(), seeds_of_samples(rng, harder * easy)
        for what, truth, interval in (
            ("share", harder * a, share_interval(runs, design_effect(runs))),
            ("share, pooled", harder * a, share_interval(runs, 1.0)),
            ("difference", (harder - 1) * a, difference_interval(runs, dense)),
            ("difference, pooled", (harder - 1) * a, difference_interval(runs, dense, pooled=True)),
        ):
            covered[what] += interval[0] <= truth <= interval[1]
    shares = {what: number / draws for what, number in covered.items()}
    assert 0.93 <= shares["share"] <= 0.97 and 0.93 <= shares["difference"] <= 0.97, shares
    assert shares["share, pooled"] < 0.9 and shares["difference, pooled"] < 0.9, shares
