"""Every configuration of the Triton attention kernels as arguments to compile, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockList, BlockSelection, HeadPattern, TokenPositions
from sparse_hf_kernels.sparse_attention.columns.kernels import (
    _column_dkdv_kernel,
    _column_dq_kernel,
    _column_forward_kernel,
    _column_sum_kernel,
)
from sparse_hf_kernels.sparse_attention.columns.launch import (
    ColumnLists,
    dkdv_launch,
    dq_launch,
    forward_launch,
    sum_launch,
)
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.backward import _dkdv_kernel, _dq_kernel, dkdv_arguments, dq_arguments
from sparse_hf_kernels.sparse_attention.triton.configs import Pass, TileConfig, compiled_config
from sparse_hf_kernels.sparse_attention.triton.forward import _forward_kernel, forward_arguments
from sparse_hf_kernels.sparse_attention.triton.launch import new_heads
from sparse_hf_kernels.tiles import RowGeometry, backward_table, forward_table

LENGTH = 2048
CPU = torch.device("cpu")
Case = tuple[Any, tuple[Any, ...], dict[str, Any], str]


def layouts() -> dict[str, tuple[AttentionLayout, TokenPositions]]:
    """What the kernels specialise on: lists or not, closed form or loaded rows and keys, block look-up, causality."""
    streaming = HeadPattern(window=256, num_sink_tokens=64)
    pages = HeadPattern(blocks=BlockList.from_mask(torch.ones(16, 16, dtype=torch.bool).tril(), 128))
    small = HeadPattern(blocks=BlockList.from_mask(torch.eye(128, dtype=torch.bool), 16))
    halves = HeadPattern(blocks=BlockList.from_mask(torch.ones(32, 32, dtype=torch.bool).tril(), 64))
    unpadded = TokenPositions.causal(LENGTH, LENGTH)
    token = torch.ones(2, LENGTH, dtype=torch.bool)
    token[1, :77] = False
    holes = token.clone()
    holes[0, 5:9] = False
    return {
        "streaming": (AttentionLayout(patterns=(streaming,) * 4), unpadded),
        "lists": (AttentionLayout(patterns=(streaming, pages) * 2), unpadded),
        "blocks of 64": (AttentionLayout(patterns=(streaming, halves) * 2), unpadded),
        "both ways, padded": (
            AttentionLayout(patterns=(streaming,) * 4, causal=False),
            TokenPositions.from_padding_mask(token),
        ),
        "holes, cut blocks": (AttentionLayout(patterns=(small,) * 4), TokenPositions.from_padding_mask(holes)),
    }


def cases(
    arch: int,
    head_dims: tuple[int, ...] = (64, 128, 256),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    names: tuple[str, ...] | None = None,
) -> Iterator[Case]:
    """(kernel, arguments, options, label) for `kernel.warmup(*arguments, grid=(1,), **options)`.

    Args:
        arch: 80, 89, 90, 100 or 120.
        names: of `layouts()`; all by default.
    """
    for name, (layout, where) in layouts().items():
        for head_dim in head_dims if names is None or name in names else ():
            for dtype in dtypes:
                for case in _kernels(arch, layout, where, head_dim, dtype):
                    yield *case[:3], f"sm_{arch} hd{head_dim} {str(dtype)[6:]} {name}: {case[3]}"


def _kernels(
    arch: int, layout: AttentionLayout, where: TokenPositions, head_dim: int, dtype: torch.dtype
) -> Iterator[Case]:
    geometry = RowGeometry.of(where)
    batch = max(1, geometry.batch)
    shared = dict(batch=batch, num_heads=8, head_dim=head_dim, device=CPU)
    problem = AttentionProblem(layout=layout, geometry=geometry, scale=0.1, deterministic=True)

    def config_of(which: Pass) -> TileConfig:
        config = compiled_config(arch, head_dim, dtype, which)
        fitted = min((p.blocks.block_size for p in layout.patterns if p.blocks is not None), default=128)
        return config.within(fitted) if geometry.is_closed_form else config

    def heads(number: int) -> Tensor:
        return new_heads(torch.empty(batch, number, LENGTH, head_dim, dtype=dtype, device="meta"))

    q, k, v, out = heads(8), heads(4), heads(4), heads(8)
    lse = torch.empty(batch, 8, LENGTH, device="meta")
    passes: tuple[Pass, ...] = ("forward", "decode")
    for which in passes:
        config = config_of(which)
        table = forward_table(layout, geometry, config.shape, **shared)
        yield (
            _forward_kernel,
            *forward_arguments(q, k, v, out, lse, problem, table, config),
            f"{which} {tuple(config)}",
        )
    inputs = (q, k, v, out, lse, lse)
    config = config_of("dkdv")
    table = backward_table(layout, geometry, config.shape, **shared)
    yield (
        _dkdv_kernel,
        *dkdv_arguments(inputs, k, v, problem, table, config),
        f"dkdv {tuple(config)}",
    )
    config = config_of("dq")
    table = forward_table(layout, geometry, config.shape, **shared)
    yield _dq_kernel, *dq_arguments(inputs, q, problem, table, config), f"dq {tuple(config)}"


def column_cases(
    arch: int,
    head_dims: tuple[int, ...] = (64, 128, 256),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
) -> Iterator[Case]:
    """Those of single columns, for blocks of 128 and of 64; as `cases`."""
    for size in (128, 64):
        for head_dim in head_dims:
            for dtype in dtypes:
                for case in _column_kernels(arch, size, head_dim, dtype):
                    yield *case[:3], f"sm_{arch} hd{head_dim} {str(dtype)[6:]} blocks of {size}: {case[3]}"


def _column_kernels(arch: int, size: int, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def heads(number: int, length: int = LENGTH) -> Tensor:
        return new_heads(torch.empty(1, number, length, head_dim, dtype=dtype, device="meta"))

    def config_of(which: Pass) -> TileConfig:
        return compiled_config(arch, head_dim, dtype, which).within(size)

    blocks = LENGTH // size
    problem = AttentionProblem(
        layout=AttentionLayout(patterns=(HeadPattern(selected=True),) * 4),
        geometry=RowGeometry.of(TokenPositions.causal(LENGTH, LENGTH)),
        scale=0.1,
        deterministic=True,
        selection=BlockSelection(
            block_size=size, counts=integers(1, 8, blocks), indices=integers(1, 8, blocks, blocks)
        ),
    )
    lists = ColumnLists(
        positions=integers(1, 8, 1024),
        covered=integers(1, 8, blocks, blocks, dtype=torch.int8),
        heads=integers(8),
        kv_heads=integers(4),
    )
    q, k, columns = heads(8), heads(4), heads(8, 1024).contiguous()
    lse, parts = torch.empty(1, 8, LENGTH, device="meta"), columns.float()
    config = config_of("forward")
    launch = forward_launch(q, columns, columns, q, lse, problem, lists, config)
    yield _column_forward_kernel, *launch[1:], f"forward {tuple(config)}"
    inputs, config = (q, columns, columns, q, lse, lse), config_of("dq")
    yield _column_dq_kernel, *dq_launch(inputs, q, problem, lists, config)[1:], f"dq {tuple(config)}"
    config = config_of("dkdv")
    launch = dkdv_launch(inputs, (parts, parts), problem, lists, config)
    yield _column_dkdv_kernel, *launch[1:], f"dkdv {tuple(config)}"
    by_position = integers(1, 4, 2048), integers(1, 4, 2048, dtype=torch.int64)
    launch = sum_launch((parts, parts), by_position, k, k, problem, lists)
    yield _column_sum_kernel, *launch[1:], "sum of parts"
