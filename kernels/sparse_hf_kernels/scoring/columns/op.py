"""K and V rows of chosen columns, gathered once per head, and the way back for their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.backend import BackendName, resolve_backend
from sparse_hf_kernels.scoring.columns.naive import gather_columns_naive, scatter_add_columns_naive


def _check(kv: Tensor, indices: Tensor, name: str) -> None:
    if (
        kv.ndim != 4
        or indices.ndim != 3
        or indices.dtype != torch.int32
        or indices.shape[0] != kv.shape[0]
        or indices.shape[1] % kv.shape[1]
    ):
        raise ValueError(
            f"expected {name} [batch, num_kv_heads, kv_len, head_dim] and int32 indices [batch, heads, columns] with "
            f"heads a multiple of num_kv_heads, got {tuple(kv.shape)} and {indices.dtype} {tuple(indices.shape)}"
        )


def scatter_add_columns(
    target: Tensor, columns: Tensor, indices: Tensor, *, backend: BackendName | None = None
) -> Tensor:
    """Adds gathered columns back to the rows they came from, in place; the same bits on every call.

    Args:
        target: `[batch, num_kv_heads, kv_len, head_dim]`. With several index heads a KV head, each is added and rounded
            in turn: give fp32 to lose nothing.
        columns: `[batch, heads, num_columns, head_dim]`.
        indices: int32 `[batch, heads, num_columns]`, as in `gather_columns`; those of one head must not repeat.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        `target`.
    """
    _check(target, indices, "target")
    if columns.shape != (*indices.shape, target.shape[3]):
        raise ValueError(
            f"expected columns of shape {(*indices.shape, target.shape[3])} for these indices, "
            f"got {tuple(columns.shape)}"
        )
    if resolve_backend(backend, target.device) == "naive":
        scatter_add_columns_naive(target, columns, indices)
    elif columns.numel():
        from sparse_hf_kernels.scoring.columns.launch import scatter_add_columns_triton

        scatter_add_columns_triton(target, columns.contiguous(), indices)
    return target


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, indices: Tensor, backend: BackendName) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dtype, ctx.backend = k.shape, k.dtype, backend
        if backend == "naive" or indices.numel() == 0:
            return gather_columns_naive(k, indices), gather_columns_naive(v, indices)
        from sparse_hf_kernels.scoring.columns.launch import gather_columns_triton

        return gather_columns_triton(k, v, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (indices,) = ctx.saved_tensors
        out: list[Tensor | None] = [None, None]
        for i, grad in enumerate(grads):
            if ctx.needs_input_grad[i]:
                target = grad.new_zeros(ctx.shape, dtype=torch.float32)
                out[i] = scatter_add_columns(target, grad, indices, backend=ctx.backend).to(ctx.dtype)
        return out[0], out[1], None, None


def gather_columns(
    k: Tensor, v: Tensor, indices: Tensor, *, backend: BackendName | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of K and V that `indices` name; differentiable in `k` and `v`, summing in fp32.

    Args:
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`, equal shapes and dtypes.
        indices: int32 `[batch, heads, num_columns]`, heads being the KV heads or a multiple of them (the query heads).
            Entries outside [0, kv_len), such as -1, are padding and give zeros. Those of one head must not repeat, or
            gradients are wrong on the device; this is not checked.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        Two tensors `[batch, heads, num_columns, head_dim]` of the dtype of `k`.
    """
    _check(k, indices, "k")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(
            f"k and v must agree in shape and dtype, got {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}"
        )
    return _GatherColumns.apply(k, v, indices, resolve_backend(backend, k.device))
