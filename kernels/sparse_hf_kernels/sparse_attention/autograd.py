"""The autograd side of fused sparse attention: what is saved, and what a backend's kernels are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_hf_kernels.sparse_attention.problem import AttentionKernels, AttentionProblem


def fused_attention(
    kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem
) -> tuple[Tensor, Tensor]:
    """Output `[batch, num_heads, q_len, head_dim]` and log-sum-exp `[batch, num_heads, q_len]`, both differentiable."""
    out, lse = _FusedAttention.apply(q, k, v, kernels, problem)
    return out, lse


def fused_backward(
    kernels: AttentionKernels,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and the log-sum-exp; None counts as 0."""
    from sparse_hf_kernels.sparse_attention.triton.delta import delta

    k, v = zero_empty_slots(k, problem), zero_empty_slots(v, problem)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return kernels.backward(grad_out, delta(out, grad_out, lse, grad_lse), q, k, v, lse, problem)


def zero_empty_slots(x: Tensor, problem: AttentionProblem) -> Tensor:
    """k or v with 0 in slots that hold no token: weight 0 times NaN would still be NaN."""
    empty = problem.geometry.empty_keys
    return x if empty is None else x.masked_fill(empty[:, None, :, None], 0)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: AttentionKernels, problem: AttentionProblem
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernels.forward(q, zero_empty_slots(k, problem), zero_empty_slots(v, problem), problem)
        # The caller's k and v, not the zeroed copies: those would double what a padded batch keeps for the backward.
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels, ctx.problem = kernels, problem
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None
        q, k, v, out, lse = ctx.saved_tensors
        return *fused_backward(ctx.kernels, grad_out, grad_lse, q, k, v, out, lse, ctx.problem), None, None
