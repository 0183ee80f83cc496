"""Sparse prefill as plain functions of q, k and v, under the names the field gives their knobs.

All take `q [batch, num_heads, q_len, head_dim]` and `k, v [batch, num_kv_heads, kv_len, head_dim]` in fp32, bf16 or
fp16, on one device. Grouped-query heads are not repeated; the queries are the last `q_len` of `kv_len` unpadded tokens,
so that chunks of a prefill are calls of their own. They return the output `[batch, num_heads, q_len, head_dim]`, and
with `return_lse` also the natural log-sum-exp of the scores that were read, fp32 `[batch, num_heads, q_len]`. All are
differentiable in q, k and v; what is read is chosen without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.config import read_mapping
from sparse_hf.dynamic import LayerHeads, attend_unpadded
from sparse_hf.methods import FlexPrefill, HeadPlace, Method, MInference, XAttention, method_from_dict
from sparse_hf.methods.minference import MInferenceHead
from sparse_hf_kernels import AttentionLayout, sparse_attention
from sparse_hf_kernels.sparse_attention.checks import check_inputs, checked_scale

Attended = Tensor | tuple[Tensor, Tensor]
"""The output, or with `return_lse` the output and the log-sum-exp."""

QUERY_CHUNK = 1024


def prefill(
    q: Tensor, k: Tensor, v: Tensor, method: Method, *, scale: float | None = None, return_lse: bool = False
) -> Attended:
    """Causal attention of which every head follows `method`; see the module for shapes.

    Args:
        method: any method, such as `load_prefill_config` returns.
        scale: factor on the scores, by default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp.

    Raises:
        ValueError: for tensors that do not fit together, or parameters per head that do not fit them.
    """
    check_inputs(q, k, v)
    num_kv_heads = k.shape[1]
    places = (HeadPlace(kv_head=head, num_kv_heads=num_kv_heads) for head in range(num_kv_heads))
    layout = AttentionLayout(patterns=tuple(method.pattern(place) for place in places))
    heads = LayerHeads.of(layout, [method] * num_kv_heads)
    heads.check(q.shape[1])
    out, lse = attend_unpadded(q, k, v, heads, scale=checked_scale(scale, q.shape[-1]), return_lse=return_lse)
    return out if lse is None else (out, lse)


def xattention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int = 16,
    threshold: float | Sequence[float] = 0.9,
    block_size: int = 128,
    sparsity_ratio: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """XAttention (arXiv 2503.16428); the knobs are those of `XAttention`, `threshold` may be one per query head."""
    method = XAttention(
        stride=stride,
        threshold=threshold if isinstance(threshold, int | float) else tuple(threshold),
        block_size=block_size,
        sparsity_ratio=sparsity_ratio,
    )
    return prefill(q, k, v, method, scale=scale, return_lse=return_lse)


def flexprefill_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    block_size: int = 128,
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """FlexPrefill (arXiv 2502.20766); the knobs are those of `FlexPrefill`, budgets in tokens."""
    method = FlexPrefill(gamma=gamma, tau=tau, min_budget=min_budget, max_budget=max_budget, block_size=block_size)
    return prefill(q, k, v, method, scale=scale, return_lse=return_lse)


def minference_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    vertical_size: int = 1000,
    slash_size: int = 6096,
    adaptive_budget: float | None = None,
    heads: Sequence[MInferenceHead] = (),
    block_size: int = 128,
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """MInference (arXiv 2407.02490), vertical-slash unless `heads` gives each query head a pattern of its own."""
    method = MInference(
        vertical_size=vertical_size,
        slash_size=slash_size,
        adaptive_budget=adaptive_budget,
        heads=tuple(heads),
        block_size=block_size,
    )
    return prefill(q, k, v, method, scale=scale, return_lse=return_lse)


def full_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Attention over all keys, or those that a mask names.

    Args:
        is_causal: no query reads a later key; by default True without a mask and False with one. With a mask both hold.
        attn_mask: boolean, broadcast to `[batch, num_heads, q_len, kv_len]`: True where the query reads the key. A row
            without any gives output 0 and log-sum-exp -inf.
        scale, return_lse: as in `prefill`.

    Raises:
        ValueError: for tensors that do not fit together, or a mask that is not boolean.
    """
    check_inputs(q, k, v)
    scale = checked_scale(scale, q.shape[-1])
    if attn_mask is not None:
        return _masked(q, k, v, _checked_mask(attn_mask, q, k), bool(is_causal), scale, return_lse)
    layout = AttentionLayout.dense(k.shape[1], causal=is_causal is not False)
    if return_lse:
        return sparse_attention(q, k, v, layout, scale=scale, return_lse=True)
    return sparse_attention(q, k, v, layout, scale=scale)


def load_prefill_config(path: str | Path) -> Method:
    """The method that a `.json`, `.yaml` or `.yml` file names: `{"method": "xattention", "stride": 16, ...}`.

    Raises:
        ValueError: if the file cannot be read, or its method or a parameter is unknown (listing the known ones).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return method_from_dict(read_mapping(path))


def _checked_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Four dimensions, the last two whole."""
    wanted = (*q.shape[:3], k.shape[2])
    fits = mask.ndim <= 4 and all(n in (1, w) for n, w in zip(reversed(mask.shape), reversed(wanted), strict=False))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"attn_mask must be boolean and broadcast to {list(wanted)}, got {mask.dtype} of {list(mask.shape)}"
        )
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask.expand(*mask.shape[:2], *wanted[2:])


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, is_causal: bool, scale: float, return_lse: bool) -> Attended:
    """SDPA over chunks of queries, the query heads of a group as rows, so that no score matrix or copy of k is made."""
    (num_kv_heads, kv_len), q_len = k.shape[1:3], q.shape[2]
    group = q.shape[1] // num_kv_heads
    if mask.shape[1] > 1:
        mask = mask.unflatten(1, (num_kv_heads, group))
    else:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1)
    grouped = q.unflatten(1, (num_kv_heads, group))
    keys = torch.arange(kv_len, device=q.device)
    outs, lses = [], []
    for start in range(0, q_len, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, q_len)
        allowed = mask[:, :, :, start:end]
        if is_causal:
            allowed = allowed & (keys <= torch.arange(start, end, device=q.device)[:, None] + kv_len - q_len)
        allowed = allowed.flatten(2, 3)
        rows = grouped[:, :, :, start:end].flatten(2, 3)
        some = allowed.any(-1, keepdim=True)
        # A row without keys reads all for the softmax and is blanked then.
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=allowed | ~some, scale=scale)
        outs.append(torch.where(some, out, 0).unflatten(2, (group, -1)))
        if return_lse:
            scores = (rows.float() @ k.float().transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
            lses.append(scores.logsumexp(-1).unflatten(2, (group, -1)))
    if not outs:
        return full_prefill(q, k, v, is_causal=False, scale=scale, return_lse=return_lse)
    out = torch.cat(outs, 3).flatten(1, 2)
    return (out, torch.cat(lses, 3).flatten(1, 2)) if return_lse else out
