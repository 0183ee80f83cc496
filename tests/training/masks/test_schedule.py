"""The target sparsity and the gates' learning rate over the steps."""

import math
from itertools import pairwise

import pytest

from sparse_hf_training.masks import SparsitySchedule
from sparse_hf_training.masks.schedule import rate_factor


@pytest.mark.parametrize("kind", ["linear", "logarithmic", "cubic"])
@pytest.mark.parametrize("end", [0.7, 0.05])
def test_schedule_runs_from_start_to_end_and_stays(kind: str, end: float) -> None:
    schedule = SparsitySchedule(start=0.1, end=end, warmup_ratio=0.5, kind=kind)  # type: ignore[arg-type]
    targets = [schedule.target(step, 100) for step in range(100)]
    assert targets[0] == pytest.approx(0.1)
    assert all((b - a) * (end - 0.1) >= 0 for a, b in pairwise(targets))
    assert targets[50:] == pytest.approx([end] * 50)
    assert targets[25] != pytest.approx(end)


def test_schedules_have_their_shapes() -> None:
    middle = {
        kind: SparsitySchedule(start=0.0, end=0.75, warmup_ratio=1.0, kind=kind).target(50, 100)  # type: ignore[arg-type]
        for kind in ("linear", "logarithmic", "cubic")
    }
    assert middle["linear"] == pytest.approx(0.375)
    # PruLong: log(1 - t) is linear.
    assert middle["logarithmic"] == pytest.approx(1 - math.exp(0.5 * math.log(1) + 0.5 * math.log(0.25)))
    # Zhu and Gupta, equation 1: t = end + (start - end) (1 - progress)^3.
    assert middle["cubic"] == pytest.approx(0.75 - 0.75 * 0.5**3)


@pytest.mark.parametrize(
    "values", [{"start": 1.0}, {"end": -0.1}, {"warmup_ratio": 1.5}, {"kind": "square"}], ids=lambda v: next(iter(v))
)
def test_schedule_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        SparsitySchedule(**values)  # type: ignore[arg-type]


def test_no_warm_up_means_the_end_at_once() -> None:
    assert SparsitySchedule(end=0.5, warmup_ratio=0.0).target(0, 10) == 0.5


def test_trapezoid_is_duo_attentions() -> None:
    """min(1, max((step + 1) / n, 0.1), max((steps - step) / n, 0.1)) with n = steps // 5, of its released training."""
    factors = [rate_factor("trapezoid", step, 2000) for step in range(2000)]
    ramp = 2000 // 5
    assert factors == pytest.approx(
        [min(1, max((n + 1) / ramp, 0.1), max((2000 - n) / ramp, 0.1)) for n in range(2000)]
    )
    assert factors[0] == 0.1 and factors[199] == 0.5 and factors[1000] == 1.0 and factors[-1] == 0.1
    assert [rate_factor("trapezoid", step, 3) for step in range(3)] == [1.0, 1.0, 1.0]  # no ramp fits
    assert rate_factor("constant", 7, 10) == 1.0
    with pytest.raises(ValueError, match="mask_rate_schedule must be one of"):
        rate_factor("step", 0, 10)  # type: ignore[arg-type]


def test_cosine_is_prulongs() -> None:
    """Hugging Face's cosine with a warm-up of 10% and a floor of 1%."""
    factors = [rate_factor("cosine", step, 1000) for step in range(1000)]
    assert factors[0] == 0.0 and factors[50] == 0.5 and factors[100] == 1.0
    middle = 0.01 + 0.99 * (1 + math.cos(math.pi * 0.5)) / 2
    assert factors[550] == pytest.approx(middle) and factors[-1] == pytest.approx(0.01, abs=1e-4)
    assert all(a >= b for a, b in pairwise(factors[100:]))
