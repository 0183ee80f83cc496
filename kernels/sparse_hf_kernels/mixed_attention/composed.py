"""The mask-learning operator from two calls of sparse attention, for backends without a kernel of their own for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions

Attend = Callable[..., tuple[Tensor, Tensor]]
"""`sparse_attention` of a backend."""


def mixed_attention_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    *,
    positions: TokenPositions,
    scale: float,
    skip_saturated: bool,
    deterministic: bool,
    attend: Attend,
) -> Tensor:
    """See `mixed_attention`. With `skip_saturated` the gates are read from the device, which waits for it."""
    branch = partial(
        _branch, q, k, v, attend=partial(attend, positions=positions, scale=scale, deterministic=deterministic)
    )
    every = list(range(k.shape[1]))
    values = gate.detach().tolist() if skip_saturated else []
    full_out = branch(full, [h for h, z in enumerate(values) if z > 0] if values else every)
    sparse_out = branch(sparse, [h for h, z in enumerate(values) if z < 1] if values else every)
    return blend(gate, full_out, sparse_out).to(q.dtype)


def blend(gate: Tensor, full: Tensor | None, sparse: Tensor | None) -> Tensor:
    """`gate * full + (1 - gate) * sparse` in fp32 `[batch, num_heads, q_len, head_dim]`; None counts as 0."""
    assert full is not None or sparse is not None
    some = full if full is not None else sparse
    assert some is not None
    z = gate.float().repeat_interleave(some.shape[1] // len(gate), output_size=some.shape[1])[:, None, None]
    if full is None or sparse is None:
        return (z if full is not None else 1 - z) * some.float()
    return z * full.float() + (1 - z) * sparse.float()


def _branch(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, heads: list[int], *, attend: Attend
) -> Tensor | None:
    """Output of these KV heads' queries, 0 elsewhere; None without heads."""
    if not heads:
        return None
    if len(heads) == k.shape[1]:
        return attend(q, k, v, layout)[0]
    index = torch.tensor(heads, device=k.device)
    grouped = q.unflatten(1, (k.shape[1], -1))
    picked = (grouped.index_select(1, index).flatten(1, 2), k.index_select(1, index), v.index_select(1, index))
    out = attend(*picked, layout.select(heads))[0].unflatten(1, (len(heads), -1))
    everywhere = out.new_zeros(out.shape[0], k.shape[1], *out.shape[2:])
    return everywhere.index_copy(1, index, out).flatten(1, 2)
