"""Tile shapes and launch options by architecture, head_dim, element size and pass.

Chosen from what offline compilation shows: shared memory within the limit, and hardly a spill inside a loop. The
exception is the element-wise block look-up, which runs only where explicit patterns meet padding or odd block sizes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton

from sparse_hf_kernels.tiles import TileShape
from sparse_hf_kernels.tuned import INTERPRETER_ARCH, Key, tuned_config

Pass = Literal["forward", "decode", "dkdv", "dq"]

MAX_HEAD_DIM = 256
DECODE_ROWS = 16
"""Forward calls with at most this many query rows take the small tile."""

SMALLEST_FITTED = 32
"""Below it small tiles cost more than looking up large ones."""


class TileConfig(NamedTuple):
    """Query rows and keys of a tile, warps and pipeline stages of a program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def shape(self) -> TileShape:
        return TileShape(rows=self.rows, columns=self.columns)

    def within(self, block_size: int) -> TileConfig:
        """Tiles that do not cut blocks of a list, so that none needs the element-wise look-up; never below 32."""
        size = block_size & -block_size  # the largest power of two that divides it
        if size < SMALLEST_FITTED:
            return self
        return self._replace(rows=min(self.rows, size), columns=min(self.columns, size))


INTERPRETER: dict[Pass, TileConfig] = {
    "forward": TileConfig(32, 16, 1, 1),
    "decode": TileConfig(16, 32, 1, 1),
    "dkdv": TileConfig(16, 32, 1, 1),
    "dq": TileConfig(32, 16, 1, 1),
}
"""Small, so that short tests walk many tiles; rows and columns differ in both directions."""

# fp32 keeps full precision on CUDA cores: for checks, not for speed.
FP32: dict[int, dict[Pass, TileConfig]] = {
    64: {
        "forward": TileConfig(32, 32, 4, 2),
        "decode": TileConfig(16, 32, 4, 2),
        "dkdv": TileConfig(16, 32, 8, 1),
        "dq": TileConfig(32, 32, 4, 2),
    },
    128: {
        "forward": TileConfig(32, 32, 8, 1),
        "decode": TileConfig(16, 32, 4, 1),
        "dkdv": TileConfig(16, 32, 8, 1),
        "dq": TileConfig(32, 32, 8, 1),
    },
    256: {
        "forward": TileConfig(16, 16, 8, 1),
        "decode": TileConfig(16, 16, 8, 1),
        "dkdv": TileConfig(16, 16, 8, 1),
        "dq": TileConfig(16, 16, 8, 1),
    },
}

HALF: dict[int, dict[int, dict[Pass, TileConfig]]] = {
    80: {
        64: {
            "forward": TileConfig(128, 64, 4, 3),
            "decode": TileConfig(16, 128, 4, 3),
            "dkdv": TileConfig(64, 128, 8, 3),
            "dq": TileConfig(128, 64, 8, 3),
        },
        128: {
            "forward": TileConfig(128, 64, 8, 3),
            "decode": TileConfig(16, 64, 4, 3),
            "dkdv": TileConfig(32, 128, 8, 3),
            "dq": TileConfig(128, 32, 8, 3),
        },
        256: {
            "forward": TileConfig(64, 64, 8, 2),
            "decode": TileConfig(16, 32, 4, 3),
            "dkdv": TileConfig(32, 64, 8, 2),
            "dq": TileConfig(64, 64, 8, 2),
        },
    },
    89: {
        64: {
            "forward": TileConfig(128, 64, 4, 3),
            "decode": TileConfig(16, 128, 4, 2),
            "dkdv": TileConfig(64, 128, 8, 2),
            "dq": TileConfig(128, 64, 8, 2),
        },
        128: {
            "forward": TileConfig(128, 64, 8, 2),
            "decode": TileConfig(16, 64, 4, 2),
            "dkdv": TileConfig(64, 64, 8, 2),
            "dq": TileConfig(64, 64, 8, 2),
        },
        256: {
            "forward": TileConfig(64, 32, 8, 2),
            "decode": TileConfig(16, 32, 4, 2),
            "dkdv": TileConfig(32, 32, 8, 1),
            "dq": TileConfig(64, 32, 8, 1),
        },
    },
    90: {
        64: {
            "forward": TileConfig(128, 128, 8, 3),
            "decode": TileConfig(16, 128, 4, 3),
            "dkdv": TileConfig(64, 128, 8, 3),
            "dq": TileConfig(128, 128, 8, 2),
        },
        128: {
            "forward": TileConfig(128, 128, 8, 3),
            "decode": TileConfig(16, 64, 4, 3),
            "dkdv": TileConfig(32, 128, 8, 3),
            "dq": TileConfig(128, 64, 8, 3),
        },
        256: {
            "forward": TileConfig(128, 64, 8, 2),
            "decode": TileConfig(16, 32, 4, 3),
            "dkdv": TileConfig(32, 64, 8, 2),
            "dq": TileConfig(64, 32, 8, 3),
        },
    },
    100: {
        64: {
            "forward": TileConfig(128, 128, 8, 3),
            "decode": TileConfig(16, 128, 4, 3),
            "dkdv": TileConfig(64, 128, 8, 2),
            "dq": TileConfig(128, 64, 8, 3),
        },
        128: {
            "forward": TileConfig(128, 128, 8, 3),
            "decode": TileConfig(16, 64, 4, 3),
            "dkdv": TileConfig(64, 128, 8, 2),
            "dq": TileConfig(128, 64, 8, 3),
        },
        256: {
            "forward": TileConfig(128, 64, 8, 2),
            "decode": TileConfig(16, 32, 4, 3),
            "dkdv": TileConfig(32, 32, 8, 2),
            "dq": TileConfig(128, 64, 8, 1),
        },
    },
}
HALF[120] = HALF[89]
"""bf16 and fp16 by architecture, then head_dim (the smallest not below the call's)."""


@lru_cache
def architecture(device: torch.device) -> int:
    """Key of `HALF`. 8.6, 8.9 and 12.x have 99 KB of shared memory a block, 8.0 and 8.7 163 KB, 9.0 to 11.x 227 KB.

    Raises:
        ValueError: for devices before compute capability 8.0.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"the Triton kernels need compute capability 8.0 or more, {device} has {major}.{minor}")
    if major == 8:
        return 80 if minor in (0, 7) else 89
    return {9: 90, 10: 100, 11: 100}.get(major, 120)


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def current_architecture(device: torch.device) -> int:
    """`architecture`, or what stands for the interpreter."""
    return INTERPRETER_ARCH if interpreted() else architecture(device)


def tile_config(device: torch.device, head_dim: int, dtype: torch.dtype, which: Pass) -> TileConfig:
    """The configuration of one pass: the user's, measured by `sparse-hf tune`, else the shipped one."""
    arch = current_architecture(device)
    key = Key("triton", which, arch, table_head_dim(head_dim), dtype)
    return tuned_config(key, TileConfig) or shipped_config(arch, head_dim, dtype, which)


def shipped_config(arch: int, head_dim: int, dtype: torch.dtype, which: Pass) -> TileConfig:
    """That of the tables above."""
    return INTERPRETER[which] if arch == INTERPRETER_ARCH else compiled_config(arch, head_dim, dtype, which)


def table_head_dim(head_dim: int) -> int:
    """The row of the tables that serves a head_dim: the smallest not below it."""
    return next(size for size in FP32 if head_dim <= size)


def compiled_config(arch: int, head_dim: int, dtype: torch.dtype, which: Pass) -> TileConfig:
    table = FP32 if dtype == torch.float32 else HALF[arch]
    return table[table_head_dim(head_dim)][which]
