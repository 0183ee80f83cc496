"""Launch configurations of the XAttention kernels by architecture and element size. Compiled: no spills."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """One GEMM configuration.

    Args:
        block_m, block_n: query and key tiles (of `stride` tokens each) per program.
        block_k: elements of head_dim per step.
        tma: read through tensor descriptors.
        columns: neighbouring column tiles that one program works through, its loads running on over their borders.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    columns: int = 1


STRIP = 8
"""Row tiles per strip: the programs that run together share 8 query tiles and about 16 key tiles in L2."""

POINTER_CONFIGS: dict[int, ScoreConfig] = {
    80: ScoreConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    89: ScoreConfig(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4),
    90: ScoreConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    100: ScoreConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    120: ScoreConfig(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4),
}

TMA_CONFIGS: dict[int, ScoreConfig] = {
    90: ScoreConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, tma=True),
    100: ScoreConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, tma=True),
}
"""None on sm_120: it has no WGMMA to feed, and the pointer kernel compiles to fewer registers there."""

FP32_CONFIG = ScoreConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3)
"""fp32 inputs (TF32 off): for checks, not for speed."""


def score_configs(arch: int, element_size: int) -> tuple[ScoreConfig, ScoreConfig | None]:
    """The pointer configuration, and the TMA configuration where there is one."""
    if element_size > 2:
        return FP32_CONFIG, None
    return POINTER_CONFIGS[arch], TMA_CONFIGS.get(arch)
