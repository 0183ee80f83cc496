"""The host side: columns as the kernels read them, and their launches. Nothing here waits for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.scoring.backend import Launch
from sparse_hf_kernels.scoring.columns.launch import gather_columns_triton
from sparse_hf_kernels.scoring.selection.kernels import _lists_to_mask_kernel
from sparse_hf_kernels.scoring.selection.launch import mask_arguments
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.columns.kernels import (
    _column_dkdv_kernel,
    _column_dq_kernel,
    _column_forward_kernel,
    _column_sum_kernel,
)
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.configs import Pass, TileConfig, current_architecture, shipped_config
from sparse_hf_kernels.sparse_attention.triton.launch import on_device_of, unit_stride

NONE = 2**31 - 1
"""Position of an entry without column: after every row, and last when sorted."""

MULTIPLE = 128
"""Columns are filled up to a multiple of every tile's."""

ENTRIES = 32
"""Of a program that sums parts."""


@lru_cache
def _selected_heads(layout: AttentionLayout, group: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of the heads that follow selected patterns: int32 query heads and KV heads; and which query heads these are."""
    chosen = torch.tensor([pattern.selected for pattern in layout.patterns])
    every = chosen.repeat_interleave(group)
    heads, kv_heads = (x.nonzero().flatten().to(device, torch.int32) for x in (every, chosen))
    return heads, kv_heads, every.to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnLists:
    """The columns of one call.

    Args:
        positions: int32 `[batch, num_heads, num_columns]`, ascending, NONE last; num_columns a multiple of MULTIPLE.
        covered: int8 `[batch, num_heads, num_q_blocks, num_kv_blocks]`, 1 where a block is listed.
        heads, kv_heads: int32, the query heads and KV heads of selected patterns; all other entries are empty.
    """

    positions: Tensor
    covered: Tensor
    heads: Tensor
    kv_heads: Tensor

    @classmethod
    def of(cls, columns: Tensor, selection: BlockSelection, problem: AttentionProblem) -> ColumnLists:
        """From a selection's columns and, apart, its blocks."""
        layout, num_heads = problem.layout, columns.shape[1]
        group = num_heads // layout.num_kv_heads
        heads, kv_heads, chosen = _selected_heads(layout, group, columns.device)
        columns = torch.where((columns >= 0) & chosen[:, None], columns, NONE)
        columns = F.pad(columns, (0, -columns.shape[-1] % MULTIPLE), value=NONE)
        # Other heads' lists may hold anything.
        counts = torch.where(chosen[:, None], selection.counts, 0).contiguous()
        num_kv_blocks = -(-problem.geometry.kv_len // selection.block_size)
        covered = torch.zeros(*counts.shape, num_kv_blocks, device=counts.device, dtype=torch.int8)
        grid, arguments, options = mask_arguments(counts, selection.indices.contiguous(), covered)
        with on_device_of(columns):
            _lists_to_mask_kernel[grid](*arguments, **options)
        return cls(positions=columns.sort(-1).values, covered=covered, heads=heads, kv_heads=kv_heads)

    def stops(self, q_len: int, offset: int, tile: int) -> Tensor:
        """How many columns the last row of each tile of rows reaches: int32 `[batch, num_heads, tiles]`."""
        ends = torch.arange(tile, q_len + tile, tile, device=self.positions.device, dtype=torch.int32)
        last = (ends.clamp_max(q_len) + (offset - 1)).expand(*self.positions.shape[:2], -1).contiguous()
        return torch.searchsorted(self.positions, last, right=True, out_int32=True)


def add_columns(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: AttentionProblem, lists: ColumnLists
) -> None:
    """Forward: out and lse of the blocks alone become those of blocks and columns."""
    q = unit_stride(q)
    config = _config(q, problem, "forward")
    with on_device_of(q):
        gathered = gather_columns_triton(unit_stride(k), unit_stride(v), lists.positions)
        grid, arguments, options = forward_launch(q, *gathered, out, lse, problem, lists, config)
        _column_forward_kernel[grid](*arguments, **options)


def add_column_gradients(
    inputs: tuple[Tensor, ...], grads: tuple[Tensor, Tensor, Tensor], problem: AttentionProblem, lists: ColumnLists
) -> None:
    """Adds the columns' share to dq, dk and dv; `inputs` are q, k, v, grad_out, and of the union lse and delta."""
    q, k, v, grad_out, lse, delta = inputs
    dq, dk, dv = grads
    with on_device_of(q):
        columns = gather_columns_triton(unit_stride(k), unit_stride(v), lists.positions)
        inputs = (unit_stride(q), *columns, unit_stride(grad_out), lse, delta)
        grid, arguments, options = dq_launch(inputs, dq, problem, lists, _config(q, problem, "dq"))
        _column_dq_kernel[grid](*arguments, **options)
        parts = tuple(torch.empty_like(x, dtype=torch.float32) for x in columns)
        config = _config(q, problem, "dkdv")
        grid, arguments, options = dkdv_launch(inputs, (parts[0], parts[1]), problem, lists, config)
        _column_dkdv_kernel[grid](*arguments, **options)
        # Stable: the heads of a group are added in their order.
        by_position = lists.positions.unflatten(1, (dk.shape[1], -1)).flatten(2).sort(dim=-1, stable=True)
        grid, arguments, options = sum_launch((parts[0], parts[1]), by_position, dk, dv, problem, lists)
        _column_sum_kernel[grid](*arguments, **options)


def forward_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: AttentionProblem, lists: ColumnLists,
    config: TileConfig,
) -> Launch:  # fmt: skip
    """Of `_column_forward_kernel`; k and v are gathered."""
    stops = lists.stops(q.shape[2], problem.geometry.offset, config.rows)
    arguments = (
        q, k, v, out, lse, lists.positions, stops, lists.covered, lists.heads, *q.stride()[:3], *out.stride()[:3],
        len(lists.heads), q.shape[1], problem.scale * math.log2(math.e), *_lengths(problem, lists),
    )  # fmt: skip
    return (stops.shape[2], len(q) * len(lists.heads)), arguments, _options(q, problem, config)


def dq_launch(
    inputs: tuple[Tensor, ...], dq: Tensor, problem: AttentionProblem, lists: ColumnLists, config: TileConfig
) -> Launch:
    """Of `_column_dq_kernel`; `inputs` are q, gathered k and v, grad_out, lse and delta."""
    q, _, _, grad_out = inputs[:4]
    stops = lists.stops(q.shape[2], problem.geometry.offset, config.rows)
    arguments = (
        *inputs, dq, lists.positions, stops, lists.covered, lists.heads,
        *q.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
        len(lists.heads), q.shape[1], problem.scale, *_lengths(problem, lists),
    )  # fmt: skip
    return (stops.shape[2], len(q) * len(lists.heads)), arguments, _options(q, problem, config)


def dkdv_launch(
    inputs: tuple[Tensor, ...], parts: tuple[Tensor, Tensor], problem: AttentionProblem, lists: ColumnLists,
    config: TileConfig,
) -> Launch:  # fmt: skip
    """Of `_column_dkdv_kernel`; `inputs` as for dQ, parts fp32 like the gathered k and v."""
    q, _, _, grad_out = inputs[:4]
    arguments = (
        *inputs, *parts, lists.positions, lists.covered, lists.heads, *q.stride()[:3], *grad_out.stride()[:3],
        len(lists.heads), q.shape[1], problem.scale, *_lengths(problem, lists),
    )  # fmt: skip
    tiles = lists.positions.shape[2] // config.columns
    return (tiles, len(q) * len(lists.heads)), arguments, _options(q, problem, config)


def sum_launch(
    parts: tuple[Tensor, Tensor], by_position: tuple[Tensor, Tensor], dk: Tensor, dv: Tensor,
    problem: AttentionProblem, lists: ColumnLists,
) -> Launch:  # fmt: skip
    """Of `_column_sum_kernel`; `by_position` are sorted positions and their order, `[batch, num_kv_heads, entries]`."""
    num_entries = by_position[0].shape[2]
    head_dim, geometry = dk.shape[3], problem.geometry
    arguments = (
        *parts, *by_position, dk, dv, lists.kv_heads, *dk.stride()[:3], *dv.stride()[:3],
        len(lists.kv_heads), dk.shape[1], parts[0].shape[1] // dk.shape[1], num_entries,
        geometry.offset + geometry.q_len,
    )  # fmt: skip
    options = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BE": ENTRIES, "num_warps": 4}
    return (triton.cdiv(num_entries, ENTRIES), len(dk) * len(lists.kv_heads)), arguments, options


def _config(q: Tensor, problem: AttentionProblem, which: Pass) -> TileConfig:
    """That of the portable kernels, as shipped: what `sparse-hf tune` found for them need not fit these."""
    assert problem.selection is not None
    config = shipped_config(current_architecture(q.device), q.shape[3], q.dtype, which)
    return config.within(problem.selection.block_size)


def _lengths(problem: AttentionProblem, lists: ColumnLists) -> tuple[int, ...]:
    """From `q_len` to `num_kv_blocks` in the kernels' signatures."""
    geometry = problem.geometry
    return geometry.q_len, geometry.offset, lists.positions.shape[2], *lists.covered.shape[2:]


def _options(q: Tensor, problem: AttentionProblem, config: TileConfig) -> dict[str, Any]:
    assert problem.selection is not None and MULTIPLE % config.columns == 0
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "BM": config.rows,
        "BN": config.columns,
        "BLOCK_SIZE": problem.selection.block_size,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
