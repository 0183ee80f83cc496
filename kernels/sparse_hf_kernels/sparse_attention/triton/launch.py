"""The host side that forward and backward share: operands as kernels take them, and what describes the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.configs import Pass, TileConfig, tile_config
from sparse_hf_kernels.tiles import TileTable
from sparse_hf_kernels.tiles.table import LARGEST_WINDOW


def unit_stride(x: Tensor) -> Tensor:
    """x, copied only if the elements of a head are not neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def new_heads(x: Tensor) -> Tensor:
    """Uninitialised `[B, H, N, D]` like x in `[B, N, H, D]` memory, which is how models go on with it."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def require_positive(scale: float) -> None:
    """Raises ValueError unless the scale is positive: kernels scale the maximum of the products."""
    if not scale > 0:
        raise ValueError(f"fused attention needs a positive scale, got {scale}; or force the reference backend")


def config_for(q: Tensor, problem: AttentionProblem, which: Pass) -> TileConfig:
    """The configuration of a pass, with tiles small enough for the blocks of explicit patterns."""
    config = tile_config(q.device, q.shape[3], q.dtype, which)
    if problem.geometry.is_closed_form and problem.geometry.start == 0:
        for pattern, _ in problem.layout.groups:
            config = config if pattern.blocks is None else config.within(pattern.blocks.block_size)
    if problem.selection is not None:
        config = config.within(problem.selection.block_size)
    return config


def table_for(build: Callable[..., TileTable], q: Tensor, problem: AttentionProblem, config: TileConfig) -> TileTable:
    """The forward or the backward table (`build`) of a call."""
    return build(
        problem.layout,
        problem.geometry,
        config.shape,
        batch=q.shape[0],
        num_heads=q.shape[1],
        head_dim=q.shape[3],
        device=q.device,
        selection=problem.selection,
    )


def mask_arguments(problem: AttentionProblem, table: TileTable) -> tuple[Any, ...]:
    """From `q_len` to `num_last` in the kernels' signatures."""
    geometry, layout = problem.geometry, problem.layout
    several = geometry.batch > 1
    return (
        geometry.q_len,
        geometry.kv_len,
        geometry.offset,
        geometry.start,
        geometry.q_len if several else 0,
        geometry.kv_len if geometry.k_pos is not None and len(geometry.k_pos) > 1 else 0,
        geometry.q_pos,
        geometry.q_start,
        geometry.q_end,
        geometry.k_pos,
        table.look_up,
        table.head_plane,
        table.look_up_size,
        0 if table.look_up is None else table.look_up.shape[-1],
        min(layout.max_distance, LARGEST_WINDOW),
        layout.num_dense_rows,
        layout.num_last_tokens,
    )


def options(problem: AttentionProblem, table: TileTable, head_dim: int, config: TileConfig) -> dict[str, Any]:
    """Constants and launch options of a kernel."""
    layout = problem.layout
    return {
        "CAUSAL": layout.causal,
        "LAST": table.has_last_rows,
        "LISTS": any(p.blocks is not None or p.selected or p.num_last_tokens for p in layout.patterns),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BM": config.rows,
        "BN": config.columns,
        "num_warps": config.num_warps,
        # Masks by look-up need some of the shared memory.
        "num_stages": config.num_stages if table.look_up is None else min(config.num_stages, 2),
    }


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """Launches go to the current device, which need not be where the tensors of a model spread over GPUs lie."""
    return torch.cuda.device_of(x)
