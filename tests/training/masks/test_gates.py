"""Hard-concrete gates, the schedule and the Lagrangian, each against its closed form."""

import math
from itertools import pairwise

import pytest
import torch

from sparse_hf_training.masks import HardConcreteGates, Lagrangian, SparsitySchedule


def draws(gates: HardConcreteGates, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([gates.sample(generator).detach() for _ in range(count)])


@pytest.mark.parametrize("log_alpha", [-1.6, 0.0, 1.0, 4.0])
def test_zero_probability_is_the_frequency_of_exact_zeros(log_alpha: float) -> None:
    gates = HardConcreteGates(20, 50, init=log_alpha)
    frequency = (draws(gates, 40) == 0).float().mean().item()
    assert frequency == pytest.approx(gates.zero_probability().mean().item(), abs=0.01)


def test_constants_of_the_published_distribution() -> None:
    # reference values: log_alpha 4 gives P(0) = 0.004, P(1) = 0.917, E = 0.977
    z = draws(HardConcreteGates(50, 50, init=4.0), 40)
    assert (z == 1).float().mean().item() == pytest.approx(0.917, abs=0.01)
    assert z.mean().item() == pytest.approx(0.977, abs=0.005)
    assert HardConcreteGates(1, 1, init=-1.599).zero_probability().item() == pytest.approx(0.5, abs=1e-3)


def test_sampling_repeats_with_its_generator_and_has_a_gradient_inside() -> None:
    gates = HardConcreteGates(4, 8, init=0.0)
    first = gates.sample(torch.Generator().manual_seed(3))
    assert torch.equal(first, gates.sample(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, gates.sample(torch.Generator().manual_seed(4)))
    (gradient,) = torch.autograd.grad(first.sum(), gates.log_alpha)
    inside = (first > 0) & (first < 1)
    assert inside.any() and (gradient[inside] > 0).all() and (gradient[~inside] == 0).all()


def test_clamp_bounds_the_parameters() -> None:
    gates = HardConcreteGates(2, 2, init=9.0, clamp=5.0)
    gates.clamp_()
    assert gates.log_alpha.max().item() == 5.0


@pytest.mark.parametrize("kind", ["linear", "logarithmic", "cubic"])
def test_schedule_runs_from_start_to_end_and_stays(kind: str) -> None:
    schedule = SparsitySchedule(start=0.1, end=0.7, warmup_ratio=0.5, kind=kind)  # type: ignore[arg-type]
    targets = [schedule.target(step, 100) for step in range(100)]
    assert targets[0] == pytest.approx(0.1)
    assert all(b >= a for a, b in pairwise(targets))
    assert targets[50:] == pytest.approx([0.7] * 50)
    assert targets[25] != pytest.approx(0.7)


def test_schedules_have_their_shapes() -> None:
    middle = {
        kind: SparsitySchedule(start=0.0, end=0.75, warmup_ratio=1.0, kind=kind).target(50, 100)
        for kind in ("linear", "logarithmic", "cubic")
    }
    assert middle["linear"] == pytest.approx(0.375)
    assert middle["logarithmic"] == pytest.approx(1 - math.sqrt(0.25))
    assert middle["cubic"] == pytest.approx(0.75 * (1 - 0.5**3))


@pytest.mark.parametrize(
    "values", [{"start": 1.0}, {"end": -0.1}, {"warmup_ratio": 1.5}, {"kind": "square"}], ids=lambda v: next(iter(v))
)
def test_schedule_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        SparsitySchedule(**values)  # type: ignore[arg-type]


def test_no_warm_up_means_the_end_at_once() -> None:
    assert SparsitySchedule(end=0.5, warmup_ratio=0.0).target(0, 10) == 0.5


def test_lagrangian_descends_in_sparsity_and_ascends_in_its_multipliers() -> None:
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.linear.fill_(-2.0)
        lagrangian.quadratic.fill_(3.0)
    sparsity = torch.tensor(0.2, requires_grad=True)
    penalty = lagrangian(sparsity, target=0.5)
    gap = 0.2 - 0.5
    assert penalty.item() == pytest.approx(-2 * gap + 3 * gap**2)
    penalty.backward()
    assert sparsity.grad is not None and lagrangian.linear.grad is not None and lagrangian.quadratic.grad is not None
    assert sparsity.grad.item() == pytest.approx(-2 + 2 * 3 * gap)
    # An optimizer subtracts gradients, so ascent needs them reversed.
    assert lagrangian.linear.grad.item() == pytest.approx(-gap)
    assert lagrangian.quadratic.grad.item() == pytest.approx(-(gap**2))


def test_lagrangian_meets_a_target_that_the_loss_resists() -> None:
    gates, lagrangian = HardConcreteGates(4, 4, init=4.0), Lagrangian()
    optimizer = torch.optim.Adam([*gates.parameters(), *lagrangian.parameters()], lr=0.1)
    value = torch.linspace(0.05, 0.5, 16).view(4, 4)  # what closing each gate costs
    for _ in range(600):
        zero = gates.zero_probability()
        loss = (zero * value).sum() + lagrangian(zero.mean(), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.clamp_()
        lagrangian.clamp_()
    assert gates.zero_probability().mean().item() == pytest.approx(0.5, abs=0.05)
    kept = gates.scores().flatten().argsort()[8:]
    assert set(kept.tolist()) == set(range(8, 16))
