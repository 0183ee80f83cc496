"""`num_dense_rows` where queries are known to stand in one run: each query then needs one of two simpler layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import layout_cuts_blocks
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.eager import attend


def attend_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions,
    scale: float,
    deterministic: bool,
    selection: BlockSelection | None,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attend`; queries below `num_dense_rows` of unpadded rows follow the dense layout, later ones one without them.

    Where a call has both it stays whole, unless its block lists cut the kernels' tiles: dense rows as such lists take
    several times what dense attention does.
    """
    q_len, num_dense = q.shape[2], _num_dense(q, k, layout, positions)
    if num_dense is None:
        pass
    elif num_dense == q_len:
        layout, selection = layout.all_dense, None
    elif num_dense == 0:
        layout = layout.without_dense_rows
    elif selection is None and layout_cuts_blocks(layout):
        return _attend_parts(q, k, v, layout, positions, scale, deterministic, needs_lse, num_dense)
    return attend(q, k, v, layout, positions, scale, deterministic, selection, needs_lse)


def _num_dense(q: Tensor, k: Tensor, layout: AttentionLayout, positions: TokenPositions) -> int | None:
    """How many of the queries, from the first on, are dense rows; None where that is not known."""
    if not layout.num_dense_rows or positions.offset is None or positions.k_offset:
        return None
    if positions.offset + q.shape[2] != k.shape[2]:
        return None
    return min(max(layout.num_dense_rows - positions.offset, 0), q.shape[2])


def _attend_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    positions: TokenPositions,
    scale: float,
    deterministic: bool,
    needs_lse: bool,
    num_dense: int,
) -> tuple[Tensor, Tensor | None]:
    assert positions.offset is not None
    border = positions.offset + num_dense
    # Queries are the last of the keys that they are given.
    parts = (
        (q[:, :, :num_dense], k[:, :, :border], v[:, :, :border], layout.all_dense),
        (q[:, :, num_dense:], k, v, layout.without_dense_rows),
    )
    found = []
    for part_q, part_k, part_v, part_layout in parts:
        stand = TokenPositions.causal(part_q.shape[2], part_k.shape[2], q.device)
        found.append(attend(part_q, part_k, part_v, part_layout, stand, scale, deterministic, None, needs_lse))
    out = torch.cat([out for out, _ in found], 2)
    lses = [lse for _, lse in found if lse is not None]
    return out, torch.cat(lses, 2) if needs_lse else None
