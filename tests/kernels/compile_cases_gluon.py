"""Every configuration of the Gluon kernels, and of those they share, as arguments to compile without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, HeadPattern, TokenPositions
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.tiles import RowGeometry, TileShape, TileTable, backward_table, forward_table

LENGTH = 300
LONG = 8192
NUM_HEADS, NUM_KV_HEADS = 4, 2
NUM_PROGRAMS = 132
LAST_ROWS = HeadPattern(window=100, num_sink_tokens=8, num_last_tokens=50)
CPU = torch.device("cpu")
Case = tuple[Any, tuple[Any, ...], dict[str, Any], str]


def layouts() -> dict[str, tuple[AttentionLayout, TokenPositions]]:
    """What the kernels specialise on: how rows and keys get their coordinates, and causality."""
    dense = AttentionLayout.dense(NUM_KV_HEADS)
    token = torch.ones(2, LENGTH, dtype=torch.bool)
    token[1, :5] = False
    holes = token.clone()
    holes[0, 7:9] = False
    padded = TokenPositions.from_padding_mask(token)
    return {
        "causal": (dense, TokenPositions.causal(LENGTH, LENGTH)),
        "more queries than keys": (dense, TokenPositions.causal(LENGTH, 128, q_offset=0)),
        "padded": (dense, padded),
        "last rows": (AttentionLayout(patterns=(LAST_ROWS,) * NUM_KV_HEADS), TokenPositions.causal(LENGTH, LENGTH)),
        "last rows, padded": (AttentionLayout(patterns=(LAST_ROWS,) * NUM_KV_HEADS), padded),
        "both ways, padded": (AttentionLayout.dense(NUM_KV_HEADS, causal=False), padded),
        "holes": (dense, TokenPositions.from_padding_mask(holes)),
    }


def cases(
    head_dims: tuple[int, ...] = (64, 128, 256),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    names: tuple[str, ...] | None = None,
) -> Iterator[Case]:
    """(kernel, arguments, options, label) for `kernel.warmup(*arguments, grid=(1,), **options)`; sm_90 alone.

    Args:
        names: of `layouts()`; all by default.
    """
    for name, (layout, where) in layouts().items():
        geometry = RowGeometry.of(where)
        problem = AttentionProblem(layout=layout, geometry=geometry, scale=0.1, deterministic=False)
        for head_dim in head_dims if names is None or name in names else ():
            for dtype in dtypes:
                for case in (*_forward(problem, head_dim, dtype), *_backward(problem, head_dim, dtype)):
                    yield *case[:3], f"sm_90 hd{head_dim} {str(dtype)[6:]} {name}: {case[3]}"
    for head_dim in head_dims:
        for dtype in dtypes:
            for case in _sums(head_dim, dtype):
                yield *case[:3], f"sm_90 hd{head_dim} {str(dtype)[6:]} {case[3]}"


def _heads(problem: AttentionProblem, number: int, length: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    shape = (max(1, problem.geometry.batch), length, number, head_dim)
    return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)


def _inputs(problem: AttentionProblem, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    geometry = problem.geometry
    q = _heads(problem, NUM_HEADS, geometry.q_len, head_dim, dtype)
    return q, _heads(problem, NUM_KV_HEADS, geometry.kv_len, head_dim, dtype)


def _forward(problem: AttentionProblem, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    from sparse_hf_kernels.sparse_attention.gluon.configs import FORWARD
    from sparse_hf_kernels.sparse_attention.gluon.forward import launch_args
    from sparse_hf_kernels.sparse_attention.gluon.forward_kernel import attention_forward_kernel

    config = FORWARD[head_dim]
    q, k = _inputs(problem, head_dim, dtype)
    shape = TileShape(rows=config.rows, columns=config.columns)
    table = forward_table(
        problem.layout,
        problem.geometry,
        shape,
        batch=len(q),
        num_heads=NUM_HEADS,
        head_dim=head_dim,
        device=CPU,
    )
    lse = torch.empty(q.shape[:3], device="meta")
    args, options = launch_args(q, k, k, q, lse, table, problem, config)
    yield attention_forward_kernel, args, options, f"{_form(options)} forward"


def _form(options: dict[str, Any]) -> str:
    """`simple` where positions are the slots themselves and the kernel leaves out every other coordinate."""
    return "simple" if options["SIMPLE"] else "general"


def _backward(problem: AttentionProblem, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    from sparse_hf_kernels.sparse_attention.gluon.backward import launch_args
    from sparse_hf_kernels.sparse_attention.gluon.backward_kernel import attention_backward_kernel
    from sparse_hf_kernels.sparse_attention.gluon.configs import BACKWARD

    config = BACKWARD.get(head_dim)
    if config is None:
        return
    q, k = _inputs(problem, head_dim, dtype)
    table = _backward_table(problem, head_dim, TileShape(rows=config.rows, columns=config.columns), len(q))
    dq_sum = torch.empty(q.shape, device="meta")
    rows = -(-q.shape[2] // config.rows) * config.rows
    stats = torch.empty(*q.shape[:2], 2, rows, device="meta")
    partials = torch.empty(max(1, table.num_partials), 2, config.columns, head_dim, device="meta")
    for with_dq in (True, False):
        args, options = launch_args(q, q, k, k, dq_sum, k, k, partials, stats, table, problem, config, with_dq=with_dq)
        yield attention_backward_kernel, args, options, f"{_form(options)} backward{' with dq' if with_dq else ''}"


def _sums(head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Adding up cut tiles, for a batch too small to fill the device with whole ones."""
    from sparse_hf_kernels.sparse_attention.gluon.configs import BACKWARD
    from sparse_hf_kernels.sparse_attention.partials import sum_partials, sum_partials_kernel

    config = BACKWARD.get(head_dim)
    if config is None:
        return
    where = TokenPositions.causal(LONG, LONG)
    layout, geometry = AttentionLayout.dense(NUM_KV_HEADS), RowGeometry.of(where)
    problem = AttentionProblem(layout=layout, geometry=geometry, scale=0.1, deterministic=False)
    table = _backward_table(problem, head_dim, TileShape(rows=config.rows, columns=config.columns), 1)
    partials = torch.empty(table.num_partials, 2, config.columns, head_dim, device="meta")
    k = _heads(problem, NUM_KV_HEADS, LONG, head_dim, dtype)
    yield *launched(sum_partials_kernel, sum_partials, partials, table, k, k), "sum of partials"


def _backward_table(problem: AttentionProblem, head_dim: int, shape: TileShape, batch: int) -> TileTable:
    return backward_table(
        problem.layout,
        problem.geometry,
        shape,
        batch=batch,
        num_heads=NUM_HEADS,
        head_dim=head_dim,
        device=CPU,
        num_programs=NUM_PROGRAMS,
    )


def delta_cases(
    arch: int, head_dims: tuple[int, ...] = (64, 128, 256), dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
) -> Iterator[Case]:
    """The row sums that every fused backward pass starts from, with and without a gradient of the log-sum-exp."""
    from sparse_hf_kernels.sparse_attention.triton.delta import _delta_kernel, delta

    for head_dim in head_dims:
        for dtype in dtypes:
            out = torch.empty(1, LENGTH, NUM_HEADS, head_dim, dtype=dtype, device="meta").transpose(1, 2)
            lse = torch.empty(out.shape[:3], device="meta")
            for grad_lse in (None, lse):
                label = f"sm_{arch} hd{head_dim} {str(dtype)[6:]} delta {'no ' if grad_lse is None else ''}grad_lse"
                yield *launched(_delta_kernel, delta, out, out, lse, grad_lse), label


def launched(kernel: Any, launch: Callable[..., Any], *inputs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What `launch(*inputs)` would run the kernel with, for launches that do not tell their arguments apart."""
    calls = []

    def note(*args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        calls.append((args, options))

    kernel.run = note  # shadows the method for this call
    try:
        launch(*inputs)
    finally:
        del kernel.run
    (call,) = calls
    return kernel, *call
