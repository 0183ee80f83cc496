"""The passes of the mask-learning operator from those of sparse attention, for backends without any of their own.

Compiled graphs need a forward and a backward pass apart from autograd; see `custom_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout


def composed_forward(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    *,
    skip_saturated: bool,
    **call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Backend.mixed_attention_forward`; `attend` is the backend's `sparse_attention`."""
    kept: list[Tensor] = []
    for layout, heads, rows in _branches(q, gate, full, sparse, skip_saturated):
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = torch.full(q.shape[:3], float("-inf"), device=q.device, dtype=torch.float32)
        if heads:
            some_out, some_lse = attend(q[:, rows], k[:, heads], v[:, heads], layout.select(heads), **call)
            assert some_lse is not None, "a backend that serves this operator has a log-sum-exp"
            out[:, rows], lse[:, rows] = some_out, some_lse
        kept += [out, lse]
    z = _per_query_head(gate, q)
    blend = z * kept[0].float() + (1 - z) * kept[2].float()
    return blend.to(q.dtype), kept[0], kept[1], kept[2], kept[3]


def composed_backward(
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad_out: Tensor,
    saved: tuple[Tensor, ...],
    full: AttentionLayout,
    sparse: AttentionLayout,
    *,
    skip_saturated: bool,
    **call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Backend.mixed_attention_backward`; `attend_backward` is its `sparse_attention_backward`."""
    q, k, v, gate, *kept = saved
    z, grad = _per_query_head(gate, q), grad_out.float()
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    branches = _branches(q, gate, full, sparse, skip_saturated)
    for (layout, heads, rows), out, lse, weight in zip(branches, kept[::2], kept[1::2], (z, 1 - z), strict=True):
        if heads:
            weighted = (weight * grad).to(q.dtype)[:, rows]
            inputs = weighted, None, q[:, rows], k[:, heads], v[:, heads], out[:, rows], lse[:, rows]
            parts = attend_backward(*inputs, layout.select(heads), **call)
            for total, part, index in zip(grads, parts, (rows, heads, heads), strict=True):
                total[:, index] += part
    difference = (grad * (kept[0].float() - kept[2].float())).sum((0, 2, 3))
    grad_gate = difference.unflatten(0, (len(gate), -1)).sum(1).to(gate.dtype)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype), grad_gate


def _branches(
    q: Tensor, gate: Tensor, full: AttentionLayout, sparse: AttentionLayout, skip_saturated: bool
) -> Iterator[tuple[AttentionLayout, list[int], list[int]]]:
    """The layout, KV heads and query heads of both branches; with `skip_saturated` the gates are read."""
    values, group = gate.tolist() if skip_saturated else [], q.shape[1] // len(gate)
    for layout, left_out in ((full, 0), (sparse, 1)):
        heads = [h for h in range(len(gate)) if not values or values[h] != left_out]
        yield layout, heads, [head * group + g for head in heads for g in range(group)]


def _per_query_head(gate: Tensor, q: Tensor) -> Tensor:
    """fp32 `[num_heads, 1, 1]`."""
    return gate.float().repeat_interleave(q.shape[1] // len(gate), output_size=q.shape[1])[:, None, None]
