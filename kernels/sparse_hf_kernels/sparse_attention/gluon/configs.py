"""Tile sizes of the Gluon kernels on sm_90, by head_dim; bf16 and fp16 alike. Measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_hf_kernels.tuned import Key, tuned_config

ARCH = 90


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """`rows` queries over two warpgroups, in `query_slots` buffers; rings of `slots` blocks of `columns` keys."""

    rows: int
    columns: int
    slots: int
    query_slots: int
    consumer_registers: int
    producer_registers: int


FORWARD = {
    64: ForwardConfig(rows=128, columns=128, slots=4, query_slots=2, consumer_registers=240, producer_registers=24),
    128: ForwardConfig(rows=128, columns=128, slots=2, query_slots=2, consumer_registers=240, producer_registers=24),
    256: ForwardConfig(rows=128, columns=64, slots=2, query_slots=1, consumer_registers=240, producer_registers=24),
}


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """Tiles of `columns` keys over two warpgroups; rings of `slots` tiles of `rows` queries and output gradients."""

    rows: int
    columns: int
    slots: int
    consumer_registers: int
    producer_registers: int


BACKWARD = {
    64: BackwardConfig(rows=128, columns=128, slots=2, consumer_registers=232, producer_registers=40),
    128: BackwardConfig(rows=64, columns=128, slots=2, consumer_registers=232, producer_registers=40),
}


def forward_config(head_dim: int, dtype: torch.dtype) -> ForwardConfig:
    """The user's, measured by `sparse-hf tune`, else the shipped one."""
    return tuned_config(Key("gluon", "forward", ARCH, head_dim, dtype), ForwardConfig) or FORWARD[head_dim]


def backward_config(head_dim: int, dtype: torch.dtype) -> BackwardConfig:
    """The user's, measured by `sparse-hf tune`, else the shipped one."""
    return tuned_config(Key("gluon", "backward", ARCH, head_dim, dtype), BackwardConfig) or BACKWARD[head_dim]
