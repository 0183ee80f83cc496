"""What the operator checks before a backend sees a call."""

from __future__ import annotations

from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.sparse_attention.checks import check_inputs, check_positions


def check_call(
    q: Tensor, k: Tensor, v: Tensor, positions: TokenPositions, full: AttentionLayout, sparse: AttentionLayout
) -> None:
    """Raises ValueError unless the layouts are static and fit q, k, v and the positions."""
    check_inputs(q, k, v, full, sparse)
    if full.selects or sparse.selects:
        raise ValueError("mixed_attention takes static patterns, got a layout of selected ones; see sparse_attention")
    check_positions(q, k, positions, full, sparse)
