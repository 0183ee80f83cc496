"""The mask-learning operator on fused kernels: two attentions, one pass over memory that blends them, one back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_hf_kernels.mixed_attention.branches import Branch, Branches, keys_of, queries_of, rows_of
from sparse_hf_kernels.sparse_attention.autograd import zero_empty_slots
from sparse_hf_kernels.sparse_attention.problem import AttentionKernels

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The blend, output and log-sum-exp of the wide branch, and those of the sparse one: 0 and -inf in heads left out."""


def fused_mixed_attention(
    kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, branches: Branches
) -> Tensor:
    """Output `[batch, num_heads, q_len, head_dim]`, differentiable in q, k, v and gate."""
    out: Tensor = _FusedMixedAttention.apply(q, k, v, gate, kernels, branches)
    return out


class _FusedMixedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, kernels: AttentionKernels, branches: Branches
    ) -> Tensor:
        out, *saved = mixed_forward(kernels, q, k, v, gate, branches)
        ctx.save_for_backward(q, k, v, gate, *saved)
        ctx.kernels, ctx.branches = kernels, branches
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return None, None, None, None, None, None
        return *mixed_backward(ctx.kernels, grad_out, ctx.saved_tensors, ctx.branches), None, None


def mixed_forward(
    kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, branches: Branches
) -> Results:
    """The blend, and what the backward pass needs of both branches."""
    from sparse_hf_kernels.mixed_attention.blend_kernels import blend

    k, v = (zero_empty_slots(x, branches.sparse.problem) for x in (k, v))
    wide, wide_lse = _attend(kernels, q, k, v, branches.wide)
    sparse, sparse_lse = _attend(kernels, q, k, v, branches.sparse)
    out = blend(gate, wide, wide_lse, sparse, sparse_lse, disjoint=branches.disjoint)
    return out, wide, wide_lse, sparse, sparse_lse


def mixed_backward(
    kernels: AttentionKernels, grad_out: Tensor, saved: tuple[Tensor, ...], branches: Branches
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate; `saved` are those and what `mixed_forward` returned after the blend."""
    from sparse_hf_kernels.mixed_attention.blend_kernels import unblend

    q, k, v, gate, wide, wide_lse, sparse, sparse_lse = saved
    lses, deltas, grad_gate = unblend(grad_out, gate, wide, wide_lse, sparse, sparse_lse, disjoint=branches.disjoint)
    k, v = (zero_empty_slots(x, branches.sparse.problem) for x in (k, v))
    return *_gradients(kernels, grad_out, lses, deltas, q, k, v, branches), grad_gate.to(gate.dtype)


def _attend(kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all heads."""
    if branch.heads is None:
        return kernels.forward(q, keys_of(branch, k), keys_of(branch, v), branch.problem)
    out, lse = _zeros(q), torch.full(q.shape[:3], float("-inf"), device=q.device, dtype=torch.float32)
    if branch.heads:
        rows = rows_of(branch, q.shape[1] // k.shape[1])
        out[:, rows], lse[:, rows] = kernels.forward(q[:, rows], keys_of(branch, k), keys_of(branch, v), branch.problem)
    return out, lse


def _gradients(
    kernels: AttentionKernels, grad_out: Tensor, lses: Tensor, deltas: Tensor, q: Tensor, k: Tensor, v: Tensor,
    branches: Branches,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v: sums over both branches, which `lses` and `deltas` `[2, ...]` belong to."""
    parts = (branches.sparse, lses[1], deltas[1]), (branches.wide, lses[0], deltas[0])
    num_kv_heads = k.shape[1]
    whole = all(branch.heads is None for branch, _, _ in parts)
    sums = kernels.query_sums(q, branches.sparse.problem) if whole else None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    for branch, lse, delta in parts:
        if branch.heads == ():
            continue
        grad_rows, delta, rows, lse = (queries_of(branch, x, num_kv_heads) for x in (grad_out, delta, q, lse))
        inputs = grad_rows, delta, rows, keys_of(branch, k), keys_of(branch, v), lse, branch.problem
        if sums is None:
            dq_part, dk_part, dv_part = kernels.backward(*inputs)
            heads = None if branch.heads is None else rows_of(branch, q.shape[1] // num_kv_heads)
            dq = _plus(dq, dq_part, q, heads, 0)
        else:
            dk_part, dv_part = sums.add(*inputs)
        heads = None if branch.heads is None else list(branch.heads)
        dk = _plus(dk, dk_part, k, heads, branch.first_key)
        dv = _plus(dv, dv_part, v, heads, branch.first_key)
    if sums is not None:
        dq = sums.total()
    assert dq is not None and dk is not None and dv is not None, "every head has a branch"
    return dq, dk, dv


def _plus(total: Tensor | None, part: Tensor, like: Tensor, heads: list[int] | None, first: int) -> Tensor:
    """The total (None for 0) plus a part of these heads (None for all) and the slots from `first` on."""
    if total is None and heads is None and not first:
        return part
    total = _zeros(like) if total is None else total
    total[:, slice(None) if heads is None else heads, first:] += part
    return total


def _zeros(x: Tensor) -> Tensor:
    """Like x `[batch, heads, length, head_dim]`, in the order of memory that kernels give their results."""
    batch, heads, length, head_dim = x.shape
    return x.new_zeros(batch, length, heads, head_dim).transpose(1, 2)
