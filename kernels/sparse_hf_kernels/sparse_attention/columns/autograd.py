"""Attention over the union of blocks and single columns: one softmax, one gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.problem import AttentionKernels, AttentionProblem


def attention_with_columns(
    kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, selection: BlockSelection
) -> tuple[Tensor, Tensor]:
    """Output `[batch, num_heads, q_len, head_dim]` and log-sum-exp `[batch, num_heads, q_len]`, both differentiable.

    The backend computes the blocks, and the softmax of each row goes on over the columns; heads of other patterns and
    heads without column are left as they are. The queries begin a block, as `forward_tiles` asks.
    """
    assert selection.columns is not None
    problem = replace(problem, selection=replace(selection, columns=None))
    out, lse = _ColumnAttention.apply(q, k, v, selection.columns, kernels, problem)
    return out, lse


class _ColumnAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        columns: Tensor,
        kernels: AttentionKernels,
        problem: AttentionProblem,
    ) -> tuple[Tensor, Tensor]:
        from sparse_hf_kernels.sparse_attention.columns.launch import ColumnLists, add_columns

        assert problem.selection is not None
        out, lse = kernels.forward(q, k, v, problem)
        lists = ColumnLists.of(columns, problem.selection, problem)
        add_columns(q, k, v, out, lse, problem, lists)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels, ctx.problem, ctx.lists = kernels, problem, lists
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        from sparse_hf_kernels.sparse_attention.columns.launch import add_column_gradients
        from sparse_hf_kernels.sparse_attention.triton.delta import delta

        if grad_out is None and grad_lse is None:
            return (None,) * 6
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        sums = delta(out, grad_out, lse, grad_lse)
        # By the weights of the union: its log-sum-exp, and its output in delta.
        grads = ctx.kernels.backward(grad_out, sums, q, k, v, lse, ctx.problem)
        add_column_gradients((q, k, v, grad_out, lse, sums), grads, ctx.problem, ctx.lists)
        return *grads, None, None, None
