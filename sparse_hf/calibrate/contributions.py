"""What heads add to a layer's output, and how much of it a choice of blocks changes, on sampled queries.

A layer's attention output is the sum over query heads of W_h o_h, W_h being the head's slice of the output projection.
An error d of o_h moves it by W_h d. Exact rows of attention are made for a few queries at a time and never kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_hf.calibrate.probe import LayerCall

_PROJECTIONS = ("o_proj", "c_proj")


def output_slices(module: nn.Module, num_heads: int) -> Tensor:
    """The output projection by query head, fp32 `[num_heads, hidden_size, head_dim]`.

    Raises:
        ValueError: if the module has no projection of a known name.
    """
    projection = next((getattr(module, name) for name in _PROJECTIONS if hasattr(module, name)), None)
    if projection is None:
        raise ValueError(f"{type(module).__name__} has none of {_PROJECTIONS}; calibration needs its output projection")
    weight = projection.weight.detach().float()
    weight = weight if isinstance(projection, nn.Linear) else weight.T  # GPT-2 keeps [in, out]
    return weight.unflatten(1, (num_heads, -1)).transpose(0, 1)


def gram_matrices(module: nn.Module, num_heads: int, group: int = 1) -> Tensor:
    """G = W^T W of each `group` neighbouring heads' slices: |W d|^2 = d^T G d.

    Returns:
        fp32 `[num_heads / group, group * head_dim, group * head_dim]`.
    """
    slices = output_slices(module, num_heads).unflatten(0, (-1, group))
    joined = slices.transpose(1, 2).flatten(2)  # [groups, hidden, group * head_dim]
    return joined.transpose(1, 2) @ joined


def squared_norms(x: Tensor, gram: Tensor) -> Tensor:
    """d^T G d of x `[..., num_heads, rows, dim]` under gram `[num_heads, dim, dim]`, as `[..., num_heads, rows]`."""
    return ((x @ gram) * x).sum(-1)


def layer_norms(out: Tensor, module: nn.Module) -> Tensor:
    """Squared norms of the layer's attention output, fp32 `[rows]`; out is `[num_heads, rows, head_dim]`."""
    slices = output_slices(module, len(out))
    return torch.einsum("hrd,hod->ro", out.float(), slices).square().sum(-1)


def sample_rows(length: int, number: int, generator: torch.Generator) -> Tensor:
    """Ascending positions, one drawn from each of `number` equal parts of [0, length): int64 `[<= number]`."""
    number = min(number, length)
    borders = torch.arange(number + 1) * length // number
    width = borders.diff()
    return borders[:-1] + (torch.rand(number, generator=generator) * width).long().clamp_max(width - 1)


def selection_errors(call: LayerCall, rows: Tensor, keep: Tensor, gram: Tensor, block_size: int) -> Tensor:
    """How much each head's contribution changes on some queries when it reads some blocks alone.

    Args:
        call: one unpadded sequence; causal.
        rows: int64 `[num_rows]`, positions of the queries, on the device.
        keep: boolean `[choices, num_heads, num_rows, num_kv_blocks]`: the blocks that each row reads.
        gram: `gram_matrices(module, num_heads)`.
        block_size: tokens per block.

    Returns:
        fp32 `[choices, num_heads]`: sums over the rows of |W_h (o' - o)|^2. Memory: num_rows * kv_len per query head
        of one KV head.
    """
    num_kv_heads, kv_len = call.k.shape[1:3]
    group = call.q.shape[1] // num_kv_heads
    keys = torch.arange(kv_len, device=rows.device)
    later, pad = keys > rows[:, None], -kv_len % block_size
    errors = []
    for head in range(num_kv_heads):
        heads = slice(head * group, (head + 1) * group)
        q, k, v = call.q[0, heads][:, rows].float(), call.k[0, head].float(), call.v[0, head].float()
        scores = (q @ k.T * call.scale).masked_fill(later, float("-inf"))
        # By blocks: what each adds to the weighted sum and to the sum of weights.
        weights = F.pad(scores.softmax(-1), (0, pad)).unflatten(-1, (-1, block_size))  # [group, rows, blocks, size]
        values = F.pad(v, (0, 0, 0, pad)).unflatten(0, (-1, block_size))  # [blocks, size, head_dim]
        parts = torch.einsum("grns,nsd->grnd", weights, values)
        chosen = keep[:, heads].float()
        mass = (chosen * weights.sum(-1)).sum(-1, keepdim=True)
        out = torch.einsum("cgrn,grnd->cgrd", chosen, parts) / mass.clamp_min(1e-30)
        errors.append(squared_norms(out - parts.sum(2), gram[heads]).sum(-1))
    return torch.cat(errors, 1)
