"""Gradients of sparse attention from its output and log-sum-exp, in plain PyTorch: what compiled graphs call.

Eager calls of the reference leave this to autograd; an operator of a compiled graph cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.reference import QUERY_CHUNK, AllowedKeys


def sparse_attention_backward_reference(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions,
    scale: float,
    deterministic: bool = False,
    selection: BlockSelection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the same bits in every run, whatever `deterministic` asks for.

    Args:
        grad_out: like out, or None for 0.
        grad_lse: like lse, or None for 0; it means nothing in rows without key.
        q, k, v, out, lse: inputs and results of `sparse_attention_reference`.
        layout, positions, scale, selection: as there.
    """
    batch, num_heads, q_len, head_dim = q.shape
    shape = (batch, k.shape[1], num_heads // k.shape[1], q_len)
    some = lse.isfinite()
    grad = torch.zeros_like(out, dtype=torch.float32) if grad_out is None else grad_out.float()
    delta = (grad * out.float()).sum(-1) - (0 if grad_lse is None else grad_lse)
    # Rows without key: exp(score - inf) is 0, and with it their share of every gradient.
    rows = {
        "q": q.float().reshape(*shape, head_dim),
        "grad": grad.reshape(*shape, v.shape[-1]),
        "delta": delta.masked_fill(~some, 0).reshape(shape),
        "lse": lse.masked_fill(~some, float("inf")).reshape(shape),
    }
    grad_q = torch.zeros_like(rows["q"])
    grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    empty = (positions.k_positions < 0)[:, None, :, None]
    with torch.autocast(device_type=q.device.type, enabled=False):
        for pattern, heads in layout.groups:
            pick = list(heads)
            keys, values = (x[:, pick].float().masked_fill(empty, 0) for x in (k, v))
            allowed = AllowedKeys(layout, pattern, heads, positions, selection, num_heads // k.shape[1])
            for start in range(0, q_len, QUERY_CHUNK):
                chunk = slice(start, start + QUERY_CHUNK)
                part = {name: x[:, pick, :, chunk] for name, x in rows.items()}
                grads = _chunk_gradients(part, keys, values, allowed.of(chunk), scale)
                grad_q[:, pick, :, chunk] = grads[0]
                grad_k[:, pick] += grads[1]
                grad_v[:, pick] += grads[2]
    return grad_q.reshape(q.shape).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _chunk_gradients(
    rows: dict[str, Tensor], k: Tensor, v: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows `[B, H, G, R, ...]` and k, v `[B, H, K, D]`: their gradients, those of k and v summed over G and R."""
    keys, values = k.unsqueeze(2), v.unsqueeze(2)
    scores = torch.matmul(rows["q"] * scale, keys.transpose(-1, -2))
    weights = (scores - rows["lse"].unsqueeze(-1)).exp().masked_fill(~allowed, 0)
    through = torch.matmul(rows["grad"], values.transpose(-1, -2)) - rows["delta"].unsqueeze(-1)
    grad_scores = weights * through * scale
    grad_k = torch.matmul(grad_scores.transpose(-1, -2), rows["q"]).sum(2)
    return torch.matmul(grad_scores, keys), grad_k, torch.matmul(weights.transpose(-1, -2), rows["grad"]).sum(2)
