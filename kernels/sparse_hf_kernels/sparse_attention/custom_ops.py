"""Sparse attention as operators of `torch.library`, which `torch.compile` keeps as one node each.

Checks and dispatch happen when the graph runs. Eager calls do not come here: an autograd function is cheaper to launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.checks import check_inputs
from sparse_hf_kernels.sparse_attention.eager import attend
from sparse_hf_kernels.sparse_attention.reference_backward import sparse_attention_backward_reference
from sparse_hf_kernels.sparse_attention.traced import (
    TracedPositions,
    layout_of,
    position_arguments,
    restored_positions,
    traced_key,
)

WHERE = (
    "Tensor? q_positions, Tensor? k_positions, Tensor? q_segments, Tensor? k_segments, Tensor? form, "
    "SymInt? q_offset, SymInt k_offset"
)
"""The operators' arguments for positions: `traced.PositionArguments`."""
NUM_WHERE = 7
CALL = f"SymInt layout, {WHERE}, float scale, bool deterministic"
# A CUDA graph would replay what was decided while it was recorded: the backend, and the tiles of those positions.
TAGS = (torch.Tag.cudagraph_unsafe,)


def traced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions | TracedPositions | None,
    q_offset: int | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Adds the operator to the graph that is being traced; arguments as in `sparse_attention`."""
    where = position_arguments(positions, q_offset)
    return attention_op(q, k, v, traced_key(layout), *where, scale, deterministic)


@torch.library.custom_op(
    "sparse_hf::sparse_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {CALL}) -> (Tensor, Tensor)",
    tags=TAGS,
)
@torch.no_grad()
def attention_op(q: Tensor, k: Tensor, v: Tensor, layout: int, *call: Any) -> tuple[Tensor, Tensor]:
    """`sparse_attention`; see `traced_attention`."""
    where, (scale, deterministic) = call[:NUM_WHERE], call[NUM_WHERE:]
    known = layout_of(layout)
    check_inputs(q, k, v, known)
    positions = restored_positions(q, k, where)
    out, lse = attend(q, k, v, known, positions, scale, deterministic)
    assert lse is not None
    return in_memory_order(out), lse.contiguous()


@torch.library.custom_op(
    "sparse_hf::sparse_attention_backward",
    mutates_args=(),
    schema="(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{CALL}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
@torch.no_grad()
def attention_backward_op(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: int,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    where, (scale, deterministic) = call[:NUM_WHERE], call[NUM_WHERE:]
    known, positions = layout_of(layout), restored_positions(q, k, where)
    options = {"positions": positions, "scale": scale, "deterministic": deterministic}
    grads = _backward(grad_out, grad_lse, q, k, v, out, lse, known, options)
    return in_memory_order(grads[0]), in_memory_order(grads[1]), in_memory_order(grads[2])


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: AttentionLayout,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    request = AttentionRequest.of("sparse_attention", q, layout, positions=options["positions"], v=v)
    compute = select_backend(request).backend.sparse_attention_backward or sparse_attention_backward_reference
    return compute(grad_out, grad_lse, q, k, v, out, lse, layout, **options)


def new_like(x: Tensor) -> Tensor:
    """Uninitialised `[B, H, N, D]` in `[B, N, H, D]` memory, as fused kernels return it: graphs rely on strides."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def new_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def in_memory_order(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@attention_op.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, layout: int, *call: Any) -> tuple[Tensor, Tensor]:
    return new_results(q, v)


@attention_backward_op.register_fake
def _attention_backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q), new_like(k), new_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *call = inputs
    is_tensor = [isinstance(x, Tensor) for x in call]
    ctx.save_for_backward(q, k, v, *output, *(x for x in call if isinstance(x, Tensor)))
    ctx.rest, ctx.is_tensor = [x for x in call if not isinstance(x, Tensor)], is_tensor
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = [None] * len(ctx.is_tensor)
    if grad_out is None and grad_lse is None:
        return None, None, None, *nothing
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    saved, rest = iter(tensors), iter(ctx.rest)
    call = [next(saved) if tensor else next(rest) for tensor in ctx.is_tensor]
    return *attention_backward_op(grad_out, grad_lse, q, k, v, out, lse, *call), *nothing


attention_op.register_autograd(_autograd_backward, setup_context=_setup_context)
