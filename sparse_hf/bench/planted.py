"""q and k with the structure that dynamic methods look for, since independent normal ones have none."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf.bench.workload import BLOCK_SIZE, Shape

NUM_TOPICS = 7
TOPIC_LOGIT = 6.0
LOCAL_LOGIT = 6.0
LOCAL_TOKENS = 256.0
MIN_HEAD_DIM = 16


def planted_inputs(shape: Shape, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q `[1, num_heads, seq_len, head_dim]` and k, v `[1, num_kv_heads, seq_len, head_dim]`, leaves.

    Attention over independent normal q and k is close to uniform, and a method that keeps 90% of it keeps nearly every
    block. Here scores are the sum of three parts, each in coordinates of its own besides the noise:

    - **Topics.** Each 128-block of keys, per KV head, has one of `NUM_TOPICS` topics; each 128-block of queries, per
      query head, asks for one. Where they agree all scores of the block pair rise by `TOPIC_LOGIT`. So a row of blocks
      has a seventh of its blocks planted, at random places, at every length.
    - **Locality.** At distance d scores rise by `LOCAL_LOGIT` times the mean of cos(w d) over `head_dim / 8` random
      frequencies w, as by rotary embedding: a Gaussian of d with deviation `LOCAL_TOKENS`, and ripples of about 1
      beyond it.
    - **Noise.** All coordinates of q, k and v are standard normal besides: scores have a deviation of about 2.

    Args:
        shape: with head_dim >= 16.
        device: where they are drawn; another device draws other numbers.
        seed: of everything.

    Raises:
        ValueError: for a smaller head_dim.
    """
    num_frequencies = shape.head_dim // 8
    if shape.head_dim < MIN_HEAD_DIM:
        raise ValueError(f"planted inputs need head_dim >= {MIN_HEAD_DIM}, got {shape.head_dim}")
    generator = torch.Generator(device).manual_seed(seed)
    positions = torch.arange(shape.seq_len, device=device)
    frequencies = torch.randn(num_frequencies, generator=generator, device=device) / LOCAL_TOKENS
    angles = positions[:, None] * frequencies
    local = torch.cat([angles.cos(), angles.sin()], -1) * _amplitude(LOCAL_LOGIT / num_frequencies, shape.head_dim)
    topics = slice(2 * num_frequencies, 2 * num_frequencies + NUM_TOPICS)
    blocks = positions // BLOCK_SIZE

    def draw(heads: int, *, structured: bool = True) -> Tensor:
        size = (1, heads, shape.seq_len, shape.head_dim)
        x = torch.randn(size, generator=generator, device=device, dtype=shape.dtype)
        if structured:
            chosen = torch.randint(NUM_TOPICS, (heads, int(blocks[-1]) + 1), generator=generator, device=device)
            planted = torch.nn.functional.one_hot(chosen, NUM_TOPICS) * _amplitude(TOPIC_LOGIT, shape.head_dim)
            x[..., : 2 * num_frequencies] += local.to(shape.dtype)
            x[..., topics] += planted[:, blocks].to(shape.dtype)
        return x.requires_grad_()

    return draw(shape.num_heads), draw(shape.num_kv_heads), draw(shape.num_kv_heads, structured=False)


def _amplitude(logit: float, head_dim: int) -> float:
    """What a coordinate of both q and k must hold to give this score after the factor `head_dim ** -0.5`."""
    return (logit * head_dim**0.5) ** 0.5
