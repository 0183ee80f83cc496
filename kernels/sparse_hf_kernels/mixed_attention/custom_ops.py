"""The mask-learning operator as a node of compiled graphs, forward and backward; see `sparse_attention.custom_ops`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest, Backend, select_backend
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.mixed_attention.checks import check_call
from sparse_hf_kernels.mixed_attention.composed import composed_backward, composed_forward
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.custom_ops import (
    NUM_WHERE,
    TAGS,
    WHERE,
    in_memory_order,
    new_like,
    new_results,
)
from sparse_hf_kernels.sparse_attention.reference_backward import sparse_attention_backward_reference
from sparse_hf_kernels.sparse_attention.traced import (
    TracedPositions,
    layout_of,
    position_arguments,
    restored_positions,
    traced_key,
)

CALL = f"SymInt full, SymInt sparse, {WHERE}, float scale, bool skip_saturated, bool deterministic"
KEPT = "Tensor wide, Tensor wide_lse, Tensor sparse_out, Tensor sparse_lse"


def traced_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    positions: TokenPositions | TracedPositions | None,
    scale: float,
    skip_saturated: bool,
    deterministic: bool,
) -> Tensor:
    """Adds the operator to the graph that is being traced; arguments as in `mixed_attention`."""
    where = position_arguments(positions, None)
    call = traced_key(full), traced_key(sparse), *where, scale, skip_saturated, deterministic
    out: Tensor = mixed_attention_op(q, k, v, gate, *call)[0]
    return out


@torch.library.custom_op(
    "sparse_hf::mixed_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor gate, {CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
@torch.no_grad()
def mixed_attention_op(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The blend, and for the backward pass what `Backend.mixed_attention_forward` keeps."""
    layouts, options = _restored(q, k, call)
    check_call(q, k, v, options["positions"], *layouts)
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        (wide, wide_lse), (sparse, sparse_lse) = new_results(q, v), new_results(q, v)
        wide_lse.fill_(float("-inf")), sparse_lse.fill_(float("-inf"))
        return new_results(q, v)[0].zero_(), wide.zero_(), wide_lse, sparse.zero_(), sparse_lse
    backend = _backend(q, v, layouts, options)
    compute = backend.mixed_attention_forward or partial(composed_forward, backend.sparse_attention)
    out, wide, wide_lse, sparse, sparse_lse = compute(q, k, v, gate, *layouts, **options)
    out, wide, sparse = in_memory_order(out), in_memory_order(wide), in_memory_order(sparse)
    return out, wide, wide_lse.contiguous(), sparse, sparse_lse.contiguous()


@torch.library.custom_op(
    "sparse_hf::mixed_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor gate, {KEPT}, {CALL}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
@torch.no_grad()
def mixed_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    wide: Tensor,
    wide_lse: Tensor,
    sparse_out: Tensor,
    sparse_lse: Tensor,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate."""
    layouts, options = _restored(q, k, call)
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        return new_like(q).zero_(), new_like(k).zero_(), new_like(v).zero_(), torch.zeros_like(gate)
    backend = _backend(q, v, layouts, options)
    attend_backward = backend.sparse_attention_backward or sparse_attention_backward_reference
    compute = backend.mixed_attention_backward or partial(composed_backward, attend_backward)
    saved = q, k, v, gate, wide, wide_lse, sparse_out, sparse_lse
    dq, dk, dv, grad_gate = compute(grad_out, saved, *layouts, **options)
    return in_memory_order(dq), in_memory_order(dk), in_memory_order(dv), grad_gate


def _restored(
    q: Tensor, k: Tensor, call: tuple[Any, ...]
) -> tuple[tuple[AttentionLayout, AttentionLayout], dict[str, Any]]:
    """Both layouts, and the other arguments of a backend's functions."""
    full, sparse, *rest = call
    where, (scale, skip_saturated, deterministic) = rest[:NUM_WHERE], rest[NUM_WHERE:]
    q_positions, k_positions, q_segments, k_segments, form, q_offset, k_offset = where
    positions = restored_positions(q, k, (q_positions, k_positions, q_segments, k_segments, form, q_offset, k_offset))
    options = dict(positions=positions, scale=scale, skip_saturated=skip_saturated, deterministic=deterministic)
    return (layout_of(full), layout_of(sparse)), options


def _backend(
    q: Tensor, v: Tensor, layouts: tuple[AttentionLayout, AttentionLayout], options: dict[str, Any]
) -> Backend:
    full, sparse = layouts
    request = AttentionRequest.of("mixed_attention", q, sparse, positions=options["positions"], v=v, full=full)
    return select_backend(request).backend


@mixed_attention_op.register_fake
def _mixed_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, sparse = new_results(q, v), new_results(q, v)
    return new_results(q, v)[0], *wide, *sparse


@mixed_attention_backward_op.register_fake
def _mixed_attention_backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_like(q), new_like(k), new_like(v), torch.empty_like(gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gate, *call = inputs
    ctx.is_tensor = [isinstance(x, Tensor) for x in call]
    ctx.save_for_backward(q, k, v, gate, *output[1:], *(x for x in call if isinstance(x, Tensor)))
    ctx.rest = [x for x in call if not isinstance(x, Tensor)]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, *kept: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = [None] * len(ctx.is_tensor)
    if grad_out is None:
        return None, None, None, None, *nothing
    saved, tensors = ctx.saved_tensors[:8], iter(ctx.saved_tensors[8:])
    rest = iter(ctx.rest)
    call = [next(tensors) if tensor else next(rest) for tensor in ctx.is_tensor]
    return *mixed_attention_backward_op(grad_out, *saved, *call), *nothing


mixed_attention_op.register_autograd(_autograd_backward, setup_context=_setup_context)
