"""The definition of sparse attention in plain PyTorch, on any device: the oracle of every kernel.

fp32 inside, masked scores take a finite value, and a row without any key gives output 0, LSE -inf and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout, HeadPattern
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection

MASK_VALUE = -1e9
"""Finite stand-in for -inf: exp(MASK_VALUE - max) is exactly 0 in fp32 and no NaN can arise."""

QUERY_CHUNK = 256


def sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    positions: TokenPositions,
    scale: float,
    deterministic: bool = False,
    selection: BlockSelection | None = None,
    mask_value: float = MASK_VALUE,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that the layout keeps.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`; each serves `num_heads / num_kv_heads` query heads in a row.
        layout: one pattern per KV head.
        positions: where the tokens stand.
        scale: factor on the scores.
        deterministic: changes nothing; no gradient is summed in an order that may vary.
        selection: what the heads of selected patterns read.
        mask_value: finite value of masked scores.

    Returns:
        Output `[batch, num_heads, q_len, head_dim]` in q's dtype, and the natural log-sum-exp of the kept scores
        `[batch, num_heads, q_len]` in fp32.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, q_len, head_dim)
    outs: list[Tensor | None] = [None] * num_kv_heads
    lses: list[Tensor | None] = [None] * num_kv_heads
    # Autocast would send the fp32 products back to half precision.
    with torch.autocast(device_type=q.device.type, enabled=False):
        for pattern, heads in layout.groups:
            # A group of all heads needs no gather.
            pick = slice(None) if len(heads) == num_kv_heads else list(heads)
            allowed = AllowedKeys(layout, pattern, heads, positions, selection, num_heads // num_kv_heads)
            out, lse = _attend_group(grouped[:, pick], k[:, pick], v[:, pick], allowed, scale, mask_value)
            for n, head in enumerate(heads):
                outs[head], lses[head] = out[:, n], lse[:, n]
    out = torch.stack([x for x in outs if x is not None], 1).reshape(batch, num_heads, q_len, v.shape[-1])
    lse = torch.stack([x for x in lses if x is not None], 1).reshape(batch, num_heads, q_len)
    return out.to(q.dtype), lse


class AllowedKeys:
    """What the heads of a pattern may read, a chunk of query rows at a time."""

    def __init__(
        self,
        layout: AttentionLayout,
        pattern: HeadPattern,
        heads: tuple[int, ...],
        positions: TokenPositions,
        selection: BlockSelection | None,
        group: int,
    ) -> None:
        self.layout, self.pattern, self.positions, self.group = layout, pattern, positions, group
        self.selection = (
            selection.select([h * group + g for h in heads for g in range(group)])
            if (pattern.selected and selection is not None)
            else None
        )

    def of(self, rows: slice) -> Tensor:
        """Boolean `[B or 1, heads or 1, group or 1, rows, kv_len]`."""
        positions = self.positions
        q, k = positions.q_positions[:, rows, None], positions.k_positions[:, None, :]
        visible = positions.visible(rows)
        last = k.expand_as(visible).masked_fill(~visible, -1).amax(-1, keepdim=True) if visible.shape[-1] else None
        allowed = (visible & self.layout.allowed(self.pattern, q, k, last))[:, None, None]
        if self.selection is None:
            return allowed
        assert positions.offset is not None
        rows = slice(rows.start, min(rows.stop, positions.q_len))
        chosen = self.selection.keeps(rows, positions.offset, positions.kv_len)
        return allowed & chosen.unflatten(1, (-1, self.group))


def _attend_group(
    q: Tensor,  # [B, H, G, Q, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,
    allowed_keys: AllowedKeys,
    scale: float,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    """Heads that share a pattern, a chunk of query rows at a time: `[B, H, G, Q, D]` and `[B, H, G, Q]`, fp32."""
    outs, lses = [], []
    for start in range(0, q.shape[3], QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        allowed = allowed_keys.of(rows)
        columns = allowed.flatten(0, 3).any(0).nonzero().flatten()
        empty = allowed_keys.positions.k_positions.index_select(1, columns) < 0
        out, lse = _softmax_attention(
            q[:, :, :, rows].float(),
            _filled(_take(k, columns, 2), empty).float(),
            _filled(_take(v, columns, 2), empty).float(),
            allowed.index_select(4, columns),
            scale,
            mask_value,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:  # no query at all
        empty = q.new_zeros(q.shape[:4], dtype=torch.float32)
        return empty.unsqueeze(-1).expand(*q.shape[:4], v.shape[-1]), empty
    return torch.cat(outs, 3), torch.cat(lses, 3)


def _take(x: Tensor, columns: Tensor, dim: int) -> Tensor:
    """`x.index_select(dim, columns)`, as a view where the columns are a range."""
    if len(columns) and int(columns[-1]) - int(columns[0]) + 1 == len(columns):
        return x.narrow(dim, int(columns[0]), len(columns))
    return x.index_select(dim, columns)


def _filled(x: Tensor, empty: Tensor) -> Tensor:
    """x `[B, H, C, D]` with 0 in slots that hold no token: whatever lies there, even NaN, has weight 0."""
    return x.masked_fill(empty[:, None, :, None], 0) if bool(empty.any()) else x


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, mask_value: float
) -> tuple[Tensor, Tensor]:
    """q `[B, H, G, R, D]`, k, v `[B, H, C, D]`, allowed `[B or 1, H or 1, G or 1, R, C]`; all fp32."""
    if k.shape[2] == 0:
        # `* 0` and the empty sums keep the graph, so that gradients exist and are 0.
        zeros = q[..., :1].expand(*q.shape[:-1], v.shape[-1]) * 0 + k.sum() + v.sum()
        return zeros, q.new_full(q.shape[:-1], float("-inf"))
    # In place where autograd does not look back: the score matrix is the only large thing here.
    scores = torch.matmul(q * scale, k.unsqueeze(2).transpose(-1, -2)).masked_fill_(~allowed, mask_value)
    has_key = allowed.any(-1)  # [B, H, G, R]
    largest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - largest).exp_()
    total = weights.sum(-1)
    out = torch.matmul(weights, v.unsqueeze(2)) / total.unsqueeze(-1) * has_key.unsqueeze(-1)
    return out, (largest.squeeze(-1) + total.log()).masked_fill(~has_key, float("-inf"))
