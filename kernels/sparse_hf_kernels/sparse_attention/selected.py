"""Attention over what a selection lists, on the fused kernels: blocks as tiles, single columns after them."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.autograd import fused_attention
from sparse_hf_kernels.sparse_attention.columns import attention_with_columns
from sparse_hf_kernels.sparse_attention.problem import AttentionKernels, AttentionProblem


def selected_attention(
    kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, selection: BlockSelection
) -> tuple[Tensor, Tensor]:
    """Output `[batch, num_heads, q_len, head_dim]` and log-sum-exp `[batch, num_heads, q_len]`, both differentiable."""
    # Tiles count from the first query: one that stands amid a block is given company, which is cut off again.
    before = problem.geometry.offset % selection.block_size
    if before:
        geometry = problem.geometry
        geometry = replace(geometry, q_len=geometry.q_len + before, offset=geometry.offset - before)
        problem, q = replace(problem, geometry=geometry), F.pad(q, (0, 0, before, 0))
    if selection.columns is None or selection.columns.shape[-1] == 0:
        problem = replace(problem, selection=replace(selection, columns=None))
        out, lse = fused_attention(kernels, q, k, v, problem)
    else:
        out, lse = attention_with_columns(kernels, q, k, v, problem, selection)
    return out[:, :, before:], lse[:, :, before:]
