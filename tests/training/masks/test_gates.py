"""Every kind of gate against its closed form: draws, expectations, gradients, bounds, first values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_hf_training.masks import BinarySTEGates, DuoGates, Gates, HardConcreteGates

KINDS: dict[str, Callable[..., Gates]] = {
    "hard_concrete": HardConcreteGates,
    "duo": DuoGates,
    "bernoulli": lambda *shape, **more: BinarySTEGates(*shape, sampling="bernoulli", **more),
    "threshold": lambda *shape, **more: BinarySTEGates(*shape, sampling="threshold", **more),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(gates: Gates, values: Tensor) -> Gates:
    with torch.no_grad():
        gates.values.copy_(values)
    return gates


def hard_concrete_by_hand(log_alpha: float, count: int = 200_000) -> Tensor:
    """z over an even grid of u in (0, 1), from Louizos et al., equations 10 and 11, in fp64."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + log_alpha) / (2 / 3)))
    return (s * 1.2 - 0.1).clamp(0, 1)


@pytest.mark.parametrize(
    ("log_alpha", "zero", "one", "mean"),
    [(4.0, 0.004, 0.917, 0.977), (0.0, 0.168, 0.168, 0.5), (-1.599, 0.5, None, None)],
)
def test_hard_concrete_has_the_published_probabilities(
    log_alpha: float, zero: float, one: float | None, mean: float | None
) -> None:
    grid = hard_concrete_by_hand(log_alpha)
    expected = HardConcreteGates(1, 1, init=log_alpha).expected_sparsity().item()
    assert expected == pytest.approx((grid == 0).double().mean().item(), abs=1e-4)
    assert expected == pytest.approx(zero, abs=6e-4)
    if one is not None and mean is not None:
        assert (grid == 1).double().mean().item() == pytest.approx(one, abs=6e-4)
        assert grid.mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.0, 4.0])
def test_hard_concrete_draws_follow_the_distribution(log_alpha: float) -> None:
    z, grid = HardConcreteGates(200, 200, init=log_alpha).sample(generator()).detach(), hard_concrete_by_hand(log_alpha)
    for test in (lambda x: x == 0, lambda x: x == 1, lambda x: x < 0.5):
        assert test(z).double().mean().item() == pytest.approx(test(grid).double().mean().item(), abs=0.012)
    assert z.mean().item() == pytest.approx(grid.mean().item(), abs=0.012)


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 2.0])
def test_binary_gates_are_open_with_their_probability(log_alpha: float) -> None:
    gates = BinarySTEGates(200, 200, init=log_alpha)
    z = gates.sample(generator())
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert 1 - z.mean().item() == pytest.approx(gates.expected_sparsity().mean().item(), abs=0.012)
    fixed = BinarySTEGates(2, 2, init=log_alpha, sampling="threshold").sample(generator())
    assert torch.equal(fixed.detach(), torch.full((2, 2), float(log_alpha > 0)))


@pytest.mark.parametrize("kind", ["hard_concrete", "duo"])
@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_gradients_of_draws_and_expectations_against_finite_differences(kind: str, granularity: str) -> None:
    gates = KINDS[kind](3, 4, granularity=granularity).double()
    at = torch.rand(gates.values.shape, generator=generator(1), dtype=torch.float64) * 0.8 + 0.1
    weight = torch.randn(3, 4, generator=generator(2), dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        filled(gates, x)
        return (weight * gates.sample(generator(5))).sum() + (weight.square() * gates.expected_sparsity()).sum()

    (found,) = torch.autograd.grad(value(at), gates.values)
    step = 1e-6
    for index in range(at.numel()):
        change = torch.zeros_like(at).view(-1)
        change[index] = step
        change = change.view(at.shape)
        slope = (value(at + change) - value(at - change)).item() / (2 * step)
        assert found.flatten()[index].item() == pytest.approx(slope, abs=1e-6)


def test_hard_concrete_has_no_gradient_where_it_is_saturated() -> None:
    gates = HardConcreteGates(4, 8, init=0.0)
    z = gates.sample(generator(3))
    (gradient,) = torch.autograd.grad(z.sum(), gates.log_alpha)
    inside = (z > 0) & (z < 1)
    assert inside.any() and not inside.all()
    assert (gradient[inside] > 0).all() and (gradient[~inside] == 0).all()
    assert gates.saturates


def test_straight_through_gradients_are_as_published() -> None:
    at, weight = torch.tensor([[-1.0, 0.5], [2.0, -3.0]]), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    # Zhou et al.: through the probability. It is the gradient of the expectation of a loss linear in z.
    drawn = filled(BinarySTEGates(2, 2), at)
    (found,) = torch.autograd.grad((weight * drawn.sample(generator())).sum(), drawn.values)
    p = 1 / (1 + torch.exp(-at))
    torch.testing.assert_close(found, weight * p * (1 - p))
    # Movement pruning: as if the threshold were the identity.
    fixed = filled(BinarySTEGates(2, 2, sampling="threshold"), at)
    (found,) = torch.autograd.grad((weight * fixed.sample(generator())).sum(), fixed.values)
    torch.testing.assert_close(found, weight)
    assert not drawn.saturates


def test_duo_gates_start_full_and_move_from_there() -> None:
    gates = DuoGates(2, 3)
    z = gates.sample(generator())
    assert torch.equal(z.detach(), torch.ones(2, 3)) and gates.expected_sparsity().abs().max().item() == 0
    (gradient,) = torch.autograd.grad(z.sum(), gates.alpha)
    assert torch.equal(gradient, torch.ones(2, 3)) and not gates.saturates
    filled(gates, torch.tensor([[-0.5, 0.25, 1.5], [0.0, 1.0, 0.5]]))
    gates.clamp_()
    assert gates.alpha.tolist() == [[0.0, 0.25, 1.0], [0.0, 1.0, 0.5]]
    drawn = gates.sample(generator())
    filled(gates, torch.zeros(2, 3))
    assert drawn[0, 1].item() == 0.25  # a drawn gate does not move with the step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_every_result_is_per_head_and_repeats(kind: str, granularity: str) -> None:
    gates = KINDS[kind](3, 4, granularity=granularity, init=0.4)
    with torch.no_grad():
        gates.values.add_(torch.linspace(-0.3, 0.3, gates.values.numel()).view(gates.values.shape))
    first = gates.sample(generator(3))
    assert torch.equal(first, gates.sample(generator(3)))
    for x in (first, gates.expected_sparsity(), gates.deterministic(), gates.scores()):
        assert x.shape == (3, 4) and x.is_contiguous() and x.dtype == torch.float32
        if granularity == "layer":
            assert torch.equal(x, x[:, :1].expand(3, 4))
    assert sum(p.numel() for p in gates.parameters()) == (12 if granularity == "kv_head" else 3)
    assert not gates.scores().requires_grad and not gates.deterministic().requires_grad
    assert (gates.deterministic().diff(dim=0) >= 0).all()


def test_gates_without_noise() -> None:
    values = torch.tensor([[-9.0, 0.0, 9.0]])
    expected = ((1 / (1 + torch.exp(-values))) * 1.2 - 0.1).clamp(0, 1)  # Louizos et al., equation 13
    torch.testing.assert_close(filled(HardConcreteGates(1, 3), values).deterministic(), expected)
    assert filled(BinarySTEGates(1, 3), values).deterministic().tolist() == [[0.0, 0.0, 1.0]]
    assert filled(DuoGates(1, 3), values.sigmoid()).deterministic()[0, 1].item() == 0.5


@pytest.mark.parametrize("kind", [HardConcreteGates, BinarySTEGates])
def test_clamp_bounds_the_logits(kind: type[HardConcreteGates]) -> None:
    gates = filled(kind(1, 2, clamp=5.0), torch.tensor([[9.0, -9.0]]))
    gates.clamp_()
    assert gates.log_alpha.tolist() == [[5.0, -5.0]]
    free = filled(kind(1, 2, clamp=None), torch.tensor([[9.0, -9.0]]))
    free.clamp_()
    assert free.log_alpha.tolist() == [[9.0, -9.0]]


@pytest.mark.parametrize(
    ("kind", "init", "sparse"), [("hard_concrete", 4.0, -4.0), ("bernoulli", 3.0, -3.0), ("duo", 0.9, 0.1)]
)
def test_gates_start_from_masks(kind: str, init: float, sparse: float) -> None:
    masks = torch.tensor([[1, 0, 0], [0, 1, 1]])
    gates = KINDS[kind](2, 3, init=init)
    gates.start_from_(masks)
    torch.testing.assert_close(gates.values.detach(), torch.where(masks == 1, init, sparse))
    assert torch.equal((gates.deterministic() > 0.5).long(), masks)
    layers = KINDS[kind](2, 3, init=init, granularity="layer")
    with pytest.raises(ValueError, match=r"mix heads in layers \[0, 1\]; use granularity 'kv_head'"):
        layers.start_from_(masks)
    layers.start_from_(torch.tensor([[0, 0, 0], [1, 1, 1]]))
    torch.testing.assert_close(layers.values.detach(), torch.tensor([[sparse], [init]]))


def test_gates_of_layers_start_in_the_order_of_mean_scores() -> None:
    gates = HardConcreteGates(3, 2, granularity="layer", init=2.0)
    gates.spread_(torch.tensor([[9.0, 0.0], [1.0, 1.0], [5.0, 5.0]]), 0.5)  # means 4.5, 1, 5
    torch.testing.assert_close(gates.values.detach(), torch.tensor([[2.0], [1.5], [2.5]]))
