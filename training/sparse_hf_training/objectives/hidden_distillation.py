"""DuoAttention's objective: stay close to the teacher's final hidden states."""

from __future__ import annotations

from torch import Tensor


def hidden_distillation_loss(states: Tensor, teacher_states: Tensor) -> Tensor:
    """Sum over label tokens of mean_d (h_teacher - h_student)^2, as the released code of arXiv 2410.10819.

    Args:
        states, teacher_states: `[num_labels, hidden_size]`, the input of the output embedding; computed in fp32. The
            teacher gets no gradient.
    """
    return (states.float() - teacher_states.detach().float()).square().mean(-1).sum()
