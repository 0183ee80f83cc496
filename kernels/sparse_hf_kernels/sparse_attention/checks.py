"""What the operators check before a backend sees a call."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection


def check_inputs(q: Tensor, k: Tensor, v: Tensor, *layouts: AttentionLayout) -> None:
    """Raises ValueError unless q, k, v and the layouts fit together."""
    of_q, of_k, of_v = q.shape, k.shape, v.shape  # each look at a tensor's shape makes it anew
    if len(of_q) != 4 or len(of_k) != 4 or len(of_v) != 4:
        raise ValueError(
            f"q, k, v must be [batch, heads, length, head_dim], got {tuple(of_q)}, {tuple(of_k)}, {tuple(of_v)}"
        )
    if of_k[:3] != of_v[:3] or of_q[0] != of_k[0] or of_q[3] != of_k[3]:
        raise ValueError(
            f"batch, key length and head_dim must agree, got q {tuple(of_q)}, k {tuple(of_k)}, v {tuple(of_v)}"
        )
    if not of_k[1] or of_q[1] % of_k[1]:
        raise ValueError(f"{of_q[1]} query heads cannot be shared out over {of_k[1]} KV heads")
    for layout in layouts:
        if layout.num_kv_heads != of_k[1]:
            raise ValueError(f"the layout describes {layout.num_kv_heads} KV heads, k has {of_k[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()) or not (q.device == k.device == v.device):
        raise ValueError(
            f"q, k, v must share one floating dtype and one device, got {q.dtype}, {k.dtype}, {v.dtype} "
            f"on {q.device}, {k.device}, {v.device}"
        )


def check_positions(q: Tensor, k: Tensor, positions: TokenPositions, *layouts: AttentionLayout) -> None:
    """Raises ValueError unless the positions have q's and k's lengths, a batch that broadcasts, and block rows."""
    given = zip(("q", "k"), positions.batches, (positions.q_len, positions.kv_len), (q, k), strict=True)
    for name, batch, length, x in given:
        if length != x.shape[2] or batch not in (1, q.shape[0]):
            raise ValueError(
                f"{name}_positions must be [{q.shape[0]} or 1, {x.shape[2]}], got {(batch, length)}; "
                "positions describe each query and each key of the call"
            )
    limits = [p.blocks.max_seq_len for x in layouts for p, _ in x.groups if p.blocks is not None]
    longest = min((limit for limit in limits if limit is not None), default=None)
    # Positions, not lengths: packing and padding make the tensors longer than a sequence, eviction shorter.
    if longest is not None and positions.max_seq_len > longest:
        raise ValueError(
            f"the explicit pattern covers {longest} tokens, got a sequence of {positions.max_seq_len}; "
            "give a pattern with more block rows"
        )


def check_selection(
    q: Tensor, positions: TokenPositions, layout: AttentionLayout, selection: BlockSelection | None
) -> None:
    """Raises ValueError unless a selection is given where the layout asks for one, and fits the call."""
    if (selection is not None) != layout.selects:
        raise ValueError(
            "a layout with selected patterns needs a selection and another takes none, got "
            f"{'no selection' if selection is None else 'a selection without a head to read it'}"
        )
    if selection is None:
        return
    if positions.offset is None or positions.k_offset:
        raise ValueError(
            "selected patterns serve one unpadded sequence per batch row, all of one length; got positions of padded "
            "or packed rows, or of a cache that dropped keys: call once per sequence"
        )
    if positions.offset + positions.q_len > positions.kv_len:
        # Tables of selections mask the block of the query alone; the last keys' block would be read to its end.
        raise ValueError(
            f"queries of selected patterns stand among the keys, got queries up to position "
            f"{positions.offset + positions.q_len - 1} and {positions.kv_len} keys; give the keys up to the last query"
        )
    if positions.offset < layout.num_dense_rows and selection.num_dense_rows < layout.num_dense_rows:
        raise ValueError(
            f"the layout has {layout.num_dense_rows} dense rows, the selection {selection.num_dense_rows}; give "
            f"selection.with_dense_rows({layout.num_dense_rows}, {positions.offset})"
        )
    size = selection.block_size
    blocks = -(-(positions.offset + positions.q_len) // size) - positions.offset // size
    if selection.counts.shape != (q.shape[0], q.shape[1], blocks) or selection.counts.device != q.device:
        raise ValueError(
            f"the selection's counts must be [{q.shape[0]}, {q.shape[1]}, {blocks}] on {q.device}, got "
            f"{tuple(selection.counts.shape)} on {selection.counts.device}"
        )
    if layout.max_distance < positions.offset + positions.q_len:
        raise ValueError(
            f"selected patterns know no sliding window of the model's own, got max_distance {layout.max_distance} and "
            f"{positions.offset + positions.q_len} tokens; use a static method in such layers"
        )


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The scale, by default `head_dim ** -0.5`.

    Raises:
        ValueError: unless it is positive: kernels take the maximum of the products before they scale it. Without a
            dimension there is no default.
    """
    if scale is None:
        if head_dim < 1:
            raise ValueError("q and k have head_dim 0, which leaves nothing to compare; give at least one dimension")
        return head_dim**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}; negate q for a negative one")
    return scale


def checked_deterministic(deterministic: bool | None) -> bool:
    """By default what `torch.use_deterministic_algorithms` says."""
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def packed_positions(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> TokenPositions:
    """The positions of packed sequences.

    Raises:
        ValueError: unless `cu_seqlens` are borders of one row of sequences that fills q and k.
    """
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"cu_seqlens packs sequences into one row of as many queries as keys, got q {tuple(q.shape)} "
            f"and k {tuple(k.shape)}; reshape to batch 1, or give positions"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [num_sequences + 1], got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )
    if not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != q.shape[2] or borders != sorted(borders):
            raise ValueError(f"cu_seqlens must ascend from 0 to the {q.shape[2]} tokens of q, got {_short(borders)}")
    return TokenPositions.from_cu_seqlens(cu_seqlens.to(q.device, torch.int64), q.shape[2])


def _short(borders: list[int]) -> str:
    return str(borders) if len(borders) <= 8 else f"[{', '.join(map(str, borders[:4]))}, ..., {borders[-1]}]"
