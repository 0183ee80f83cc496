"""Every configuration of the Triton attention kernels as arguments to compile, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, TokenPositions
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
