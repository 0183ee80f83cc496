"""XAttention block scores in plain torch, fp32: the definition that the kernels are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.geometry import BlockGrid


def _tiles(x: Tensor, start: int, num_tiles: int, stride: int, begin: int) -> Tensor:
    """Rows of `x` (its first row at position `begin`) as `[B, H, num_tiles, stride, D]` fp32 tiles from `start`.

    Positions that `x` does not hold are zeros.
    """
    length = num_tiles * stride
    tiles = x.new_zeros(*x.shape[:2], length, x.shape[3], dtype=torch.float32)
    low, high = max(start, begin), min(start + length, begin + x.shape[2])
    tiles[:, :, low - start : high - start] = x[:, :, low - begin : high - begin].float()
    return tiles.unflatten(2, (num_tiles, stride))


def block_mass_naive(q: Tensor, k: Tensor, grid: BlockGrid, stride: int, scale: float) -> Tensor:
    """See `xattention_block_mass`; one query block at a time."""
    batch, num_heads = q.shape[:2]
    num_kv_heads = k.shape[1]
    width = grid.block_size // stride  # tiles per block
    num_tiles = grid.num_kv_blocks * width
    keys = _tiles(k, 0, num_tiles, stride, 0).flatten(3)[:, :, None]  # [B, Hkv, 1, tiles, stride * D]
    columns = torch.arange(num_tiles, device=q.device)
    end = -(-(grid.q_offset + grid.q_len) // stride)
    mass = torch.zeros(batch, num_heads, grid.num_q_blocks, grid.num_kv_blocks, device=q.device, dtype=torch.float32)
    for row in range(grid.num_q_blocks):
        first = (grid.first_block + row) * width
        queries = _tiles(q, first * stride, width, stride, grid.q_offset).flip(3).flatten(3)
        queries = queries.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))  # [B, Hkv, G, width, stride * D]
        tiles = torch.arange(first, first + width, device=q.device)
        logits = (queries @ keys.transpose(-1, -2)) * (scale / stride)
        weights = logits.masked_fill(columns > tiles[:, None], float("-inf")).softmax(-1)
        held = (tiles >= grid.q_offset // stride) & (tiles < end)
        weights = weights * held[:, None]
        mass[:, :, row] = weights.unflatten(-1, (-1, width)).sum((-1, -3)).flatten(1, 2)
    return mass
