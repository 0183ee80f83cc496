"""Penalties on expected sparsity against their formulas, with one constraint and with several."""

import pytest
import torch
from torch import Tensor

from sparse_hf_training.masks import L1, AbsoluteGap, DuoGates, Gates, HardConcreteGates, Lagrangian, Regularizer
from sparse_hf_training.masks.regularizers import make_regularizer


def set_multipliers(lagrangian: Lagrangian, linear: Tensor, quadratic: Tensor) -> None:
    assert lagrangian.linear is not None and lagrangian.quadratic is not None
    with torch.no_grad():
        lagrangian.linear.copy_(linear)
        lagrangian.quadratic.copy_(quadratic)


def test_lagrangian_descends_in_sparsity_and_ascends_in_its_multipliers() -> None:
    lagrangian = Lagrangian()
    set_multipliers(lagrangian, torch.tensor(-2.0), torch.tensor(3.0))
    sparsity = torch.tensor(0.2, requires_grad=True)
    penalty = lagrangian(sparsity, target=0.5)
    gap = 0.2 - 0.5
    assert penalty.item() == pytest.approx(-2 * gap + 3 * gap**2)
    penalty.backward()
    assert sparsity.grad is not None and lagrangian.linear is not None and lagrangian.quadratic is not None
    assert lagrangian.linear.grad is not None and lagrangian.quadratic.grad is not None
    assert sparsity.grad.item() == pytest.approx(-2 + 2 * 3 * gap)
    # An optimizer subtracts gradients, so ascent needs them reversed.
    assert lagrangian.linear.grad.item() == pytest.approx(-gap)
    assert lagrangian.quadratic.grad.item() == pytest.approx(-(gap**2))


def test_each_constraint_has_multipliers_of_its_own() -> None:
    shares, sparsity, target = (0.5, 0.25, 0.25), torch.tensor([0.2, 0.9, 0.4]), [0.5, 0.5, 0.4]
    linear, quadratic = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0, 0.0, 5.0])
    lagrangian = Lagrangian(shares, weight=2.0)
    set_multipliers(lagrangian, linear, quadratic)
    wanted = 2 * sum(
        w * (a * (s - t) + b * (s - t) ** 2)
        for w, a, b, s, t in zip(shares, linear.tolist(), quadratic.tolist(), sparsity.tolist(), target, strict=True)
    )
    penalty = lagrangian(sparsity, target)
    assert penalty.item() == pytest.approx(wanted)
    penalty.backward()
    assert lagrangian.linear is not None and lagrangian.linear.grad is not None
    torch.testing.assert_close(lagrangian.linear.grad, -2 * torch.tensor([0.5 * -0.3, 0.25 * 0.4, 0.0]))
    assert lagrangian.metrics() == pytest.approx({"lagrangian/linear": 0.75, "lagrangian/quadratic": 3.25})


def test_equal_multipliers_on_parts_are_one_multiplier_on_the_whole() -> None:
    sparsity = torch.tensor([0.1, 0.5, 0.6])
    parts, whole = Lagrangian((0.25, 0.25, 0.5)), Lagrangian()
    set_multipliers(parts, torch.full((3,), 1.5), torch.zeros(3))
    set_multipliers(whole, torch.tensor(1.5), torch.tensor(0.0))
    mean = (sparsity * torch.tensor([0.25, 0.25, 0.5])).sum()
    assert parts(sparsity, 0.3).item() == pytest.approx(whole(mean, 0.3).item())


@pytest.mark.parametrize("term", ["linear", "quadratic"])
def test_lagrangian_of_one_term(term: str) -> None:
    lagrangian = Lagrangian(linear=term == "linear", quadratic=term == "quadratic")
    assert [name for name, _ in lagrangian.named_parameters()] == [term]
    with torch.no_grad():
        lagrangian.get_parameter(term).fill_(2.0)
    assert lagrangian(torch.tensor(0.1), 0.4).item() == pytest.approx(2 * (-0.3 if term == "linear" else 0.09))
    assert set(lagrangian.metrics()) == {f"lagrangian/{term}"}
    with pytest.raises(ValueError, match="its linear term, its quadratic term or both"):
        Lagrangian(linear=False, quadratic=False)


def test_bounds_of_multipliers() -> None:
    lagrangian = Lagrangian((0.5, 0.5), clamp=1.0)
    set_multipliers(lagrangian, torch.tensor([-3.0, 3.0]), torch.tensor([-3.0, 3.0]))
    lagrangian.clamp_()
    assert lagrangian.linear is not None and lagrangian.linear.tolist() == [-1.0, 1.0]
    assert lagrangian.quadratic is not None and lagrangian.quadratic.tolist() == [0.0, 1.0]


def test_absolute_gap() -> None:
    sparsity = torch.tensor([0.2, 0.7], requires_grad=True)
    penalty = AbsoluteGap((0.25, 0.75), weight=4.0)(sparsity, [0.5, 0.5])
    assert penalty.item() == pytest.approx(4 * (0.25 * 0.3 + 0.75 * 0.2))
    (gradient,) = torch.autograd.grad(penalty, sparsity)
    assert gradient.tolist() == pytest.approx([-1.0, 3.0])


def test_l1_of_duo_gates_is_the_papers() -> None:
    """DuoAttention: reg_weight * mean |alpha| with 0.05."""
    gates = DuoGates(2, 3)
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.75, 0.1]]))
    l1 = make_regularizer("l1", (1.0,))
    penalty = l1(gates.expected_sparsity().mean(), 0.9)
    assert penalty.item() == pytest.approx(0.05 * gates.alpha.abs().mean().item())
    (gradient,) = torch.autograd.grad(penalty, gates.alpha)
    torch.testing.assert_close(gradient, torch.full((2, 3), 0.05 / 6))


def test_unknown_regularizer() -> None:
    with pytest.raises(ValueError, match=r"regularizer must be one of \['lagrangian', 'abs', 'l1'\], got 'l2'"):
        make_regularizer("l2", (1.0,))  # type: ignore[arg-type]


def learned(gates: Gates, regularizer: Regularizer, target: float, rate: float) -> Gates:
    """Gates against a loss that says what closing each costs: 0.05 to 0.5, in order."""
    optimizer = torch.optim.Adam([*gates.parameters(), *regularizer.parameters()], lr=rate)
    cost = torch.linspace(0.05, 0.5, 16).view(4, 4)
    for _ in range(600):
        sparsity = gates.expected_sparsity()
        loss = (sparsity * cost).sum() + regularizer(sparsity.mean(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.clamp_()
        regularizer.clamp_()
    return gates


def test_lagrangian_meets_a_target_that_the_loss_resists() -> None:
    gates = learned(HardConcreteGates(4, 4), Lagrangian(), 0.5, 0.1)
    assert gates.expected_sparsity().mean().item() == pytest.approx(0.5, abs=0.05)
    assert set(gates.scores().flatten().argsort()[8:].tolist()) == set(range(8, 16))


def test_l1_closes_exactly_the_gates_that_cost_less_than_its_weight() -> None:
    """The loss is sum c (1 - a) + w mean a, so a gate closes where c < w / 16."""
    gates = learned(DuoGates(4, 4), L1(weight=16 * 0.21), 0.0, 0.02)
    cost = torch.linspace(0.05, 0.5, 16).view(4, 4)
    torch.testing.assert_close(gates.deterministic(), (cost > 0.21).float())
