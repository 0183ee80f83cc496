"""Sparsities by layers: which constraint a layer answers to, and what rounding makes of it."""

import pytest
import torch
from torch import Tensor

from sparse_hf_training.masks import Budgets, LayerBudget, MaskLearning, MaskLearningConfig

BUDGETS = (LayerBudget(layers="0", head_sparsity=0.0), LayerBudget(layers="3-4", head_sparsity=0.75))


def budgets(*entries: LayerBudget, shared: float = 0.5, held: frozenset[int] = frozenset()) -> Budgets:
    return Budgets.of(entries, shared, 6, held=held)


def lowest(row: Tensor, count: int) -> set[int]:
    return set(row.flatten().argsort()[:count].tolist())


def test_layers_are_held_own_or_shared() -> None:
    found = budgets(*BUDGETS, held=frozenset({5}))
    assert found.held == {0, 5} and found.own == {3: 0.75, 4: 0.75} and found.shared == [1, 2]
    assert found.ends == [0.5, 0.75, 0.75] and found.shares == [0.5, 0.25, 0.25]
    x = torch.rand(6, 4)
    expected = torch.stack([x[1:3].mean(), x[3].mean(), x[4].mean()])
    torch.testing.assert_close(found.per_constraint(x), expected)


def test_without_budgets_there_is_one_constraint_on_all() -> None:
    found, x = budgets(), torch.rand(6, 4)
    assert found.ends == [0.5] and found.shares == [1.0]
    torch.testing.assert_close(found.per_constraint(x), x.mean()[None])


def test_a_budget_for_every_layer_leaves_nothing_shared() -> None:
    found = budgets(LayerBudget(layers="*", head_sparsity=0.5), LayerBudget(layers="4-", head_sparsity=0.25))
    assert found.shared == [] and found.ends == [0.5] * 4 + [0.25] * 2
    masks = found.round(torch.rand(6, 4))
    assert (masks == 0).sum(1).tolist() == [2, 2, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="set the sparsity of every layer"):
        found.round(torch.rand(6, 4), 0.3)


def test_rounding_obeys_each_budget() -> None:
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    masks = budgets(*BUDGETS).round(scores)
    assert masks[0].tolist() == [1, 1, 1, 1]
    for layer in (3, 4):
        assert {n for n in range(4) if masks[layer, n] == 0} == lowest(scores[layer], 3)
    shared = [1, 2, 5]
    flat = masks[shared].flatten()
    assert {n for n in range(12) if flat[n] == 0} == lowest(scores[shared], 6)
    looser = budgets(*BUDGETS).round(scores, 0.25)
    assert int((looser[shared] == 0).sum()) == 3 and torch.equal(looser[[0, 3, 4]], masks[[0, 3, 4]])


@pytest.mark.parametrize(
    ("entries", "held", "message"),
    [
        ((LayerBudget(layers="6", head_sparsity=0.5),), (), "goes beyond the last layer, 5"),
        ((LayerBudget(layers="1", head_sparsity=0.5),), (1,), r"ask layers \[1\] to be sparse, which layers_from"),
        ((LayerBudget(layers="*", head_sparsity=0.0),), (), "nothing to learn"),
    ],
)
def test_budgets_that_do_not_fit(entries: tuple[LayerBudget, ...], held: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budgets(*entries, held=frozenset(held))


def test_budgets_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"head_sparsity must lie in \[0, 1\), got 1"):
        LayerBudget(layers="1", head_sparsity=1.0)
    with pytest.raises(ValueError, match="not understood"):
        LayerBudget(layers="a-b", head_sparsity=0.5)


@pytest.mark.parametrize("gates", ["hard_concrete", "binary_ste", "duo"])
def test_every_layer_learns_its_own_target(gates: str) -> None:
    """The loss wants heads kept, less in later ones; multipliers of each layer find its own target."""
    config = MaskLearningConfig(
        gates=gates,  # type: ignore[arg-type]
        layer_budgets=BUDGETS,
        end_head_sparsity=0.5,
        sparsity_warmup_ratio=0.3,
        mask_learning_rate=0.02 if gates == "duo" else 0.1,
        reg_learning_rate=0.1,
    )
    learning = MaskLearning(config, 6, 4)
    groups = [
        {"params": list(learning.gates.parameters()), "lr": config.mask_learning_rate},
        {"params": list(learning.regularizer.parameters()), "lr": config.reg_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups)
    cost = torch.linspace(0.06, 0.02, 4)
    for step in range(600):
        learning.begin_step(step, 600)
        loss = (learning.gates.expected_sparsity() * cost).sum() + learning.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning.after_step()
    per_layer = learning.expected_sparsity().mean(1)
    assert per_layer[0].item() == 0.0
    assert per_layer[[3, 4]].tolist() == pytest.approx([0.75, 0.75], abs=0.1)
    assert per_layer[[1, 2, 5]].mean().item() == pytest.approx(0.5, abs=0.1)
    masks = learning.head_masks()
    assert (masks == 0).sum(1).tolist() == [0, 2, 2, 3, 3, 2] and not masks[:, 0].eq(0).any()
    metrics = learning.metrics()
    assert learning.target == pytest.approx((3 * 0.5 + 2 * 0.75) / 6) == metrics["sparsity/target"]
    assert metrics["sparsity/largest_gap"] < 0.1


def test_held_layers_draw_ones_and_learn_nothing() -> None:
    config = MaskLearningConfig(layer_budgets=BUDGETS, init_log_alpha=0.0)
    learning = MaskLearning(config, 6, 4, held=frozenset({5}))
    learning.draw()
    z = torch.stack([gate for n in range(6) if (gate := learning.layer_gate(n)) is not None])
    assert torch.equal(z[[0, 5]], torch.ones(2, 4)) and not torch.equal(z[[1, 2]], torch.ones(2, 4))
    (z.sum() + learning.penalty()).backward()
    gradient = learning.gates.values.grad
    assert gradient is not None and (gradient[[0, 5]] == 0).all() and (gradient[[1, 2, 3, 4]] != 0).any(1).all()
    assert learning.head_masks()[[0, 5]].eq(1).all()


def test_layers_as_a_whole() -> None:
    config = MaskLearningConfig(
        granularity="layer", layer_budgets=(LayerBudget(layers="5", head_sparsity=0.0),), end_head_sparsity=0.4
    )
    learning = MaskLearning(config, 6, 4)
    with torch.no_grad():
        learning.gates.values.copy_(torch.tensor([[3.0], [-1.0], [2.0], [-2.0], [1.0], [-9.0]]))
    assert learning.head_masks().tolist() == [[1] * 4, [0] * 4, [1] * 4, [0] * 4, [1] * 4, [1] * 4]
    with pytest.raises(ValueError, match="with granularity 'layer' a layer is sparse or not"):
        MaskLearningConfig(granularity="layer", layer_budgets=BUDGETS)
