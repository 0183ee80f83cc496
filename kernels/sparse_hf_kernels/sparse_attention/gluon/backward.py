"""Launching the backward kernel, and adding up tiles that were cut in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_hf_kernels.sparse_attention.gluon.backward_kernel import attention_backward_kernel
from sparse_hf_kernels.sparse_attention.gluon.configs import BACKWARD, BackwardConfig, backward_config
from sparse_hf_kernels.sparse_attention.gluon.launch import (
    descriptor,
    geometry_args,
    num_multiprocessors,
    tma_ready,
)
from sparse_hf_kernels.sparse_attention.partials import sum_partials
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.backward import backward as portable_backward
from sparse_hf_kernels.sparse_attention.triton.backward import query_gradient
from sparse_hf_kernels.tiles import TileShape, TileTable, backward_table

NO_WEIGHT = -1.0e30
"""Stands for -LSE / scale in rows without key: their weights become exactly 0."""


def attention_backward(
    grad_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, problem: AttentionProblem
) -> tuple[Tensor, Tensor, Tensor]:
    """See `AttentionKernels.backward`.

    dQ is summed in memory by fp32 additions in no fixed order. If the same bits are asked of every run, a kernel of its
    own computes it, from the rows' side. Heads of 256 take more registers than there are: the portable kernels serve
    them.
    """
    if q.shape[3] not in BACKWARD:
        return portable_backward(grad_out, delta, q, k, v, lse, problem)
    sums = query_sums(q, problem)
    if sums is not None:
        dk, dv = sums.add(grad_out, delta, q, k, v, lse, problem)
        return sums.total(), dk, dv
    inputs = tma_ready(q), tma_ready(k), tma_ready(v), tma_ready(grad_out), lse, delta
    dk, dv = _walk_keys(inputs, None, problem)
    dq = _new_gradient(q)
    query_gradient(inputs, dq, problem)
    return dq, dk, dv


@dataclass(frozen=True, kw_only=True, eq=False)
class GluonQuerySums:
    """`QuerySums` in memory: fp32 `[batch, num_heads, q_len, head_dim]` with the strides of `like_q`."""

    sums: Tensor
    like_q: Tensor
    scale: float

    def add(
        self, grad_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, problem: AttentionProblem
    ) -> tuple[Tensor, Tensor]:
        assert problem.scale == self.scale and not problem.deterministic
        inputs = tma_ready(q), tma_ready(k), tma_ready(v), tma_ready(grad_out), lse, delta
        return _walk_keys(inputs, self.sums, problem)

    def total(self) -> Tensor:
        return torch.mul(self.sums, self.scale, out=_new_gradient(self.like_q))


def query_sums(q: Tensor, problem: AttentionProblem) -> GluonQuerySums | None:
    """See `AttentionKernels.query_sums`."""
    if problem.deterministic or q.shape[3] not in BACKWARD:
        return None
    # Strides as in dq, so that scaling the sums reads and writes in one order.
    batch, num_heads, q_len, head_dim = q.shape
    sums = q.new_zeros(batch, q_len, num_heads, head_dim, dtype=torch.float32).transpose(1, 2)
    return GluonQuerySums(sums=sums, like_q=q, scale=problem.scale)


def _new_gradient(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _walk_keys(inputs: tuple[Tensor, ...], dq_sum: Tensor | None, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """dK and dV; adds dQ / scale to `dq_sum` if there is one. `inputs` are q, k, v, grad_out, lse and delta."""
    q, k, v, grad_out, lse, delta = inputs
    batch, num_heads, _, head_dim = q.shape
    config = backward_config(head_dim, q.dtype)
    table = backward_table(
        problem.layout,
        problem.geometry,
        TileShape(rows=config.rows, columns=config.columns),
        batch=batch,
        num_heads=num_heads,
        head_dim=head_dim,
        device=q.device,
        num_programs=num_multiprocessors(q.device),
        selection=problem.selection,
    )
    dk, dv = _new_gradient(k), _new_gradient(v)
    with_dq = dq_sum is not None
    if dq_sum is None:  # a descriptor has to name something
        dq_sum = q.new_empty(batch, 1, num_heads, head_dim, dtype=torch.float32).transpose(1, 2)
    partials = q.new_empty(max(1, table.num_partials), 2, config.columns, head_dim, dtype=torch.float32)
    stats = row_statistics(lse, delta, problem.scale, config.rows)
    args, options = launch_args(
        grad_out, q, k, v, dq_sum, dk, dv, partials, stats, table, problem, config, with_dq=with_dq
    )
    with torch.cuda.device_of(q):
        attention_backward_kernel[(table.num_tiles,)](*args, **options)
        sum_partials(partials, table, dk, dv)
    return dk, dv


def row_statistics(lse: Tensor, delta: Tensor, scale: float, tile: int) -> Tensor:
    """What the accumulators start with: -LSE / scale and -delta, fp32 `[batch, num_heads, 2, whole tiles]`."""
    batch, num_heads, q_len = lse.shape
    stats = torch.zeros(batch, num_heads, 2, -(-q_len // tile) * tile, dtype=torch.float32, device=lse.device)
    stats[:, :, 0, q_len:] = NO_WEIGHT
    stats[:, :, 0, :q_len] = torch.where(lse == float("-inf"), NO_WEIGHT, lse * (-1 / scale))
    stats[:, :, 1, :q_len] = -delta
    return stats


def statistics_descriptor(stats: Tensor, tile: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)
    return TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [1, 1, 2, tile], layout)


def launch_args(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq_sum: Tensor,
    dk: Tensor,
    dv: Tensor,
    partials: Tensor,
    stats: Tensor,
    table: TileTable,
    problem: AttentionProblem,
    config: BackwardConfig,
    *,
    with_dq: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the kernel."""
    num_heads, head_dim, half = q.shape[1], q.shape[3], config.columns // 2
    args = (
        descriptor(q, config.rows),
        descriptor(grad_out, config.rows),
        descriptor(k, half),
        descriptor(v, half),
        statistics_descriptor(stats, config.rows),
        descriptor(dq_sum, config.rows, head_dim // 2),
        descriptor(dk, half),
        descriptor(dv, half),
        partials,
        table.rows,
        table.schedule,
        table.lists,
        k.shape[1],
        num_heads // k.shape[1],
        table.group_stride,
        problem.scale,
    )
    options = dict(
        geometry_args(problem.geometry, problem.layout, table),
        BM=config.rows,
        BN=config.columns,
        D=head_dim,
        SLOTS=config.slots,
        WITH_DQ=with_dq,
        CONSUMER_REGS=config.consumer_registers,
        PRODUCER_REGS=config.producer_registers,
        num_warps=4,
    )
    return args, options
