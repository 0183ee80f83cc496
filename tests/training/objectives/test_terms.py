"""Each term and its gradient against the definition."""

import pytest
import torch
from torch import Tensor

from sparse_hf_training.objectives import (
    ObjectiveConfig,
    distillation_loss,
    hidden_distillation_loss,
    label_positions,
    language_modeling_loss,
)


def gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def test_cross_entropy() -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    expected = -logits.softmax(-1)[torch.arange(5), targets].log().sum()
    actual = language_modeling_loss(logits, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient(actual, logits), gradient(expected, logits))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_kl(temperature: float) -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    teacher = torch.randn(5, 11, requires_grad=True)
    before = logits.clone(), teacher.clone()
    p, q = (teacher / temperature).softmax(-1).detach(), (logits / temperature).softmax(-1)
    expected = (p * (p / q).log()).sum() * temperature**2
    actual = distillation_loss(logits, teacher, temperature)
    torch.testing.assert_close(actual, expected)
    # Three times the loss: the closed form must carry the incoming gradient.
    torch.testing.assert_close(gradient(3 * actual, logits), gradient(3 * expected, logits))
    assert torch.equal(logits, before[0]) and torch.equal(teacher, before[1])
    assert teacher.grad is None


def test_logit_kl_in_half_precision_is_computed_in_fp32() -> None:
    logits, teacher = torch.randn(5, 501).bfloat16() * 8, torch.randn(5, 501).bfloat16() * 8
    torch.testing.assert_close(distillation_loss(logits, teacher), distillation_loss(logits.float(), teacher.float()))


def test_hidden_states() -> None:
    states, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    actual = hidden_distillation_loss(states, teacher)
    expected = sum(((teacher[i] - states[i]) ** 2).sum() / 7 for i in range(5))
    torch.testing.assert_close(actual, torch.as_tensor(expected))
    torch.testing.assert_close(gradient(actual, states)[0], 2 * (states - teacher).detach() / 7)
    assert not torch.autograd.grad(hidden_distillation_loss(states, teacher), teacher, allow_unused=True)[0]


def test_label_positions_of_shifted_labels_stay_where_they_are() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 7]])
    kept, targets = label_positions(labels)
    assert kept.tolist() == [[True, True, False, True, False]] and targets.tolist() == [5, 6, 7]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    again = label_positions(shifted, shifted=True)
    assert torch.equal(again[0], kept) and torch.equal(again[1], targets)
    # The halves of a row that was shifted first lose nothing at the border.
    halves = [label_positions(half, shifted=True)[1] for half in shifted.split([1, 4], dim=1)]
    assert torch.equal(torch.cat(halves), targets)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl": 0.0}, "one must be positive"),
        ({"hidden": -1.0}, "must not be negative"),
        ({"lm": float("nan")}, "must not be negative"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens must be positive, got 0"),
        ({"kernel": "triton"}, r"kernel must be one of \['auto', 'torch', 'liger'\], got 'triton'"),
        ({"kernel": "liger", "lm": 1.0}, "kernel liger computes lm alone"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)  # type: ignore[arg-type]
