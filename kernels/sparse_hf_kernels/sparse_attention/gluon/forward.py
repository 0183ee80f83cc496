"""Launching the forward kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.sparse_attention.gluon.configs import ForwardConfig, forward_config
from sparse_hf_kernels.sparse_attention.gluon.forward_kernel import attention_forward_kernel
from sparse_hf_kernels.sparse_attention.gluon.launch import (
    LOG2E,
    descriptor,
    geometry_args,
    num_multiprocessors,
    tma_ready,
)
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.tiles import TileShape, TileTable, forward_table


def attention_forward(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """See `AttentionKernels.forward`."""
    batch, num_heads, q_len, head_dim = q.shape
    out = q.new_empty(batch, q_len, num_heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch, num_heads, q_len, dtype=torch.float32, device=q.device)
    config = forward_config(head_dim, q.dtype)
    table = forward_table(
        problem.layout,
        problem.geometry,
        TileShape(rows=config.rows, columns=config.columns),
        batch=batch,
        num_heads=num_heads,
        head_dim=head_dim,
        device=q.device,
        selection=problem.selection,
    )
    args, options = launch_args(tma_ready(q), tma_ready(k), tma_ready(v), out, lse, table, problem, config)
    with torch.cuda.device_of(q):
        attention_forward_kernel[(min(num_multiprocessors(q.device), table.num_tiles),)](*args, **options)
    return out, lse


def launch_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: TileTable,
    problem: AttentionProblem,
    config: ForwardConfig,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the kernel."""
    num_heads, head_dim = q.shape[1], q.shape[3]
    consumer_rows = config.rows // 2
    args = (
        descriptor(q, consumer_rows),
        descriptor(k, config.columns),
        descriptor(v, config.columns),
        descriptor(out, consumer_rows),
        table.rows,
        table.schedule,
        table.lists,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        table.num_tiles,
        num_heads,
        num_heads // k.shape[1],
        lse,
        problem.scale * LOG2E,
    )
    options = dict(
        geometry_args(problem.geometry, problem.layout, table),
        HM=consumer_rows,
        BN=config.columns,
        D=head_dim,
        SLOTS=config.slots,
        Q_SLOTS=config.query_slots,
        CONSUMER_REGS=config.consumer_registers,
        PRODUCER_REGS=config.producer_registers,
        num_warps=4,
    )
    return args, options
