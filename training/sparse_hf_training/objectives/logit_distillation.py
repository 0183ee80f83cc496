"""KL divergence to the teacher's next-token distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Summed KL(teacher || student) in nats, times temperature squared (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        logits, teacher_logits: `[num_labels, vocab]`; computed in fp32. The teacher gets no gradient.
        temperature: of both.
    """
    return _Distillation.apply(logits, teacher_logits, temperature)


class _Distillation(torch.autograd.Function):
    """The gradient by its closed form, T * (student - teacher): autograd would keep both distributions in fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        student = _log_probabilities(logits, temperature)
        teacher = _log_probabilities(teacher_logits, temperature)
        probabilities = teacher.exp()
        value = teacher.sub_(student).mul_(probabilities).sum() * temperature**2
        if ctx.needs_input_grad[0]:
            gradient = student.exp_().sub_(probabilities).mul_(temperature)
            ctx.save_for_backward(gradient.to(logits.dtype))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1:
        logits = logits.float() / temperature
    return torch.log_softmax(logits, -1, dtype=torch.float32)
