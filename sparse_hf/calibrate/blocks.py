"""What calibrations of methods share that choose blocks: which layers they serve, densities, rules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparse_hf.calibrate.framework import Target
from sparse_hf.config import LayerRule
from sparse_hf.methods.dynamic import DynamicMethod
from sparse_hf_kernels import BlockSelection


def check_dynamic(target: Target, block_size: int) -> None:
    """Raises ValueError if a method that chooses blocks has nothing to choose in this model at this length."""
    if not target.free_layers:
        raise ValueError("every layer has a sliding window of its own, which dynamic methods do not serve")
    if target.seq_len <= 2 * block_size:
        raise ValueError(
            f"sequences up to 2 * block_size = {2 * block_size} tokens are dense, got --seq-len {target.seq_len}"
        )


def full_rules(methods: Mapping[int, DynamicMethod]) -> tuple[LayerRule, ...]:
    """One rule per layer for its full heads; layers with equal methods share one."""
    layers: dict[DynamicMethod, list[int]] = {}
    for layer, method in methods.items():
        layers.setdefault(method, []).append(layer)
    return tuple(LayerRule(layers=",".join(map(str, found)), full=method) for method, found in layers.items())


def num_causal_blocks(length: int, block_size: int) -> int:
    number = -(-length // block_size)
    return number * (number + 1) // 2


def forced_density(length: int, block_size: int) -> float:
    """Share of the causal blocks that are the first of their row or on the diagonal, which all rows keep."""
    return (2 * -(-length // block_size) - 1) / num_causal_blocks(length, block_size)


def rows_of(selection: BlockSelection, rows: Tensor, num_blocks: int) -> Tensor:
    """The blocks that queries at positions `rows` read: boolean `[num_heads, rows, num_blocks]`."""
    return selection.block_mask(num_blocks)[0][:, rows // selection.block_size]
