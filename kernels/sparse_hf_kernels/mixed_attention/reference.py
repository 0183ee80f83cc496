"""The definition of the mask-learning operator: gate * full + (1 - gate) * sparse, per KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.reference import sparse_attention_reference


def mixed_attention_reference(
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
    deterministic: bool = False,
) -> Tensor:
    """See `mixed_attention`. Each branch is computed for the heads that need it; `deterministic` changes nothing."""
    values = gate.detach().tolist()
    needs_full = [h for h, z in enumerate(values) if z > 0 or not skip_saturated]
    needs_sparse = [h for h, z in enumerate(values) if z < 1 or not skip_saturated]
    batch, num_heads, q_len, _ = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.reshape(batch, num_kv_heads, -1, q_len, q.shape[-1])

    def branch(layout: AttentionLayout, heads: list[int]) -> dict[int, Tensor]:
        if not heads:
            return {}
        picked = grouped[:, heads].flatten(1, 2)
        out, _ = sparse_attention_reference(
            picked, k[:, heads], v[:, heads], layout.select(heads), positions=positions, scale=scale
        )
        out = out.reshape(batch, len(heads), -1, q_len, v.shape[-1])
        return {head: out[:, n] for n, head in enumerate(heads)}

    full_out, sparse_out = branch(full, needs_full), branch(sparse, needs_sparse)
    z = gate.to(torch.float32)
    heads = []
    for h in range(num_kv_heads):
        terms = [z[h] * full_out[h].float()] if h in full_out else []
        terms += [(1 - z[h]) * sparse_out[h].float()] if h in sparse_out else []
        heads.append(sum(terms[1:], terms[0]))
    return torch.stack(heads, 1).reshape(batch, num_heads, q_len, v.shape[-1]).to(q.dtype)
