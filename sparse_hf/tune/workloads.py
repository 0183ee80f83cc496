"""What a configuration is timed on: dense causal, streaming and random blocks, or a decode step over a long cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_hf.bench.contenders import SparseHF
from sparse_hf.bench.session import timed_call
from sparse_hf.bench.workload import BLOCK_SIZE, Direction, Shape, make_inputs, random_blocks, streaming, uniform
from sparse_hf_kernels import AttentionLayout
from sparse_hf_kernels.tuned import Key

WINDOW = 1024
KEEP = 0.25


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A call that configurations are timed on.

    Args:
        name: what tables call it.
        run: computes what has to be equal whatever the configuration, `[..., rows, head_dim]` each.
    """

    name: str
    run: Callable[[], tuple[Tensor, ...]]


def make_workloads(
    key: Key, device: torch.device, *, seq_len: int, num_heads: int, num_kv_heads: int
) -> list[Workload]:
    """The workloads of a key; the longest has 2 * seq_len tokens, a decode step 4 * seq_len keys.

    Raises:
        ValueError: if the backend cannot serve one on this device.
    """
    shape = Shape(
        seq_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=key.head_dim, dtype=key.dtype
    )
    dense = AttentionLayout.dense(num_kv_heads)
    if key.kind == "decode":
        long = replace(shape, seq_len=4 * seq_len)
        return [_workload(key, device, name, size, dense) for name, size in (("decode", shape), ("decode, long", long))]
    double = replace(shape, seq_len=2 * seq_len)
    window = min(WINDOW, max(1, seq_len // 2))
    return [
        _workload(key, device, "dense causal", shape, dense),
        _workload(key, device, "streaming", double, uniform(streaming(window), num_kv_heads)),
        _workload(key, device, "random blocks", double, random_blocks(num_kv_heads, _whole(double.seq_len), KEEP)),
    ]


def _whole(seq_len: int) -> int:
    return -(-seq_len // BLOCK_SIZE) * BLOCK_SIZE


def _workload(key: Key, device: torch.device, name: str, shape: Shape, layout: AttentionLayout) -> Workload:
    contender = SparseHF(backend=key.backend, device=device.type)
    if reason := contender.refuses(shape, layout):
        raise ValueError(f"{key.backend} cannot be tuned on {device}: {reason}")
    q, k, v = make_inputs(shape, device)
    if key.kind == "decode":
        q = q.detach()[:, :, -1:]
    direction: Direction = "forward" if key.kind in ("forward", "decode") else "backward"
    call = timed_call(contender.bind(q, k, v, layout), direction)

    def run() -> tuple[Tensor, ...]:
        result = call()
        return result if isinstance(result, tuple) else (result,)

    return Workload(name=f"{name}, {shape.seq_len} tokens", run=run)
