"""From block scores to the compact lists that the attention kernels read. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.scoring.backend import BackendName, resolve_backend
from sparse_hf_kernels.scoring.selection.naive import (
    select_top_k_naive,
    select_top_p_naive,
    transpose_lists_naive,
)


def _budget(value: float | Tensor, scores: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """One budget per head on the scores' device."""
    heads = scores.shape[1]
    if not isinstance(value, Tensor):
        return torch.full((heads,), value, dtype=dtype, device=scores.device)
    if value.shape != (heads,):
        raise ValueError(f"{name} must be a number or a tensor of shape [{heads}], got shape {tuple(value.shape)}")
    return value.to(device=scores.device, dtype=dtype).contiguous()


def _first_block(scores: Tensor, first_block: int | None) -> int:
    if scores.ndim != 4 or not scores.is_floating_point():
        raise ValueError(
            f"expected floating scores [batch, num_heads, num_q_blocks, num_kv_blocks], "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    num_q, num_kv = scores.shape[2:]
    first = num_kv - num_q if first_block is None else first_block
    if not 0 <= first <= num_kv - num_q:
        raise ValueError(
            f"query blocks must lie among the KV blocks: 0 <= first_block <= num_kv_blocks - num_q_blocks, "
            f"got first_block {first}, {num_q} query and {num_kv} KV blocks"
        )
    return first


@torch.no_grad()
def select_top_p(
    mass: Tensor,
    threshold: float | Tensor,
    *,
    first_block: int | None = None,
    keep_sink: bool = True,
    keep_diagonal: bool = True,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row the fewest blocks, largest first, whose mass reaches `threshold` of the row's total.

    Forced blocks come first and their mass counts. Equal masses are taken by ascending index. Where the total itself
    decides, the order of fp32 additions may move a row by the block that lies on the border.

    Args:
        mass: `[batch, num_heads, num_q_blocks, num_kv_blocks]`, not negative; what lies after the diagonal is ignored.
        threshold: in [0, 1], a number or one per head `[num_heads]`. 0 keeps the forced blocks alone, 1 all.
        first_block: KV block of the first query block, by default the queries' blocks are the last.
        keep_sink, keep_diagonal: always keep KV block 0, the query block's own.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        `counts` int32 `[batch, num_heads, num_q_blocks]` and `indices` int32 `[batch, num_heads, num_q_blocks,
        num_kv_blocks]`, ascending; entries from `counts` on are unspecified.
    """
    first = _first_block(mass, first_block)
    if not isinstance(threshold, Tensor) and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    budget = _budget(threshold, mass, torch.float32, "threshold")
    if resolve_backend(backend, mass.device) == "naive":
        return select_top_p_naive(mass, budget, first, keep_sink, keep_diagonal)
    from sparse_hf_kernels.scoring.selection.launch import select_triton

    return select_triton(mass, budget, first, keep_sink, keep_diagonal)


@torch.no_grad()
def select_top_k(
    scores: Tensor,
    k: int | Tensor,
    *,
    first_block: int | None = None,
    keep_sink: bool = True,
    keep_diagonal: bool = True,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row its `k` largest blocks, forced ones among them; all causal ones where there are no more than `k`.

    Args:
        scores: `[batch, num_heads, num_q_blocks, num_kv_blocks]`, any finite values.
        k: a number or one per head, int `[num_heads]`. Forced blocks are kept even if they are more than `k`.

    The other arguments, ties and the result are those of `select_top_p`.
    """
    first = _first_block(scores, first_block)
    if not isinstance(k, Tensor) and k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    budget = _budget(k, scores, torch.int32, "k")
    if resolve_backend(backend, scores.device) == "naive":
        return select_top_k_naive(scores, budget, first, keep_sink, keep_diagonal)
    from sparse_hf_kernels.scoring.selection.launch import select_triton

    return select_triton(scores, budget, first, keep_sink, keep_diagonal)


@torch.no_grad()
def transpose_lists(
    counts: Tensor,
    indices: Tensor,
    num_kv_blocks: int,
    *,
    descending: bool = False,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """The query blocks that read each KV block, for the backward pass; bitwise the same on every call.

    Args:
        counts: int32 `[batch, num_heads, num_q_blocks]`.
        indices: int32 `[batch, num_heads, num_q_blocks, slots]`; the first `counts` of a row lie in
            [0, num_kv_blocks) without repeats, the others are ignored.
        num_kv_blocks: length of a transposed row.
        descending: list the last query block first.
        backend: "triton" or "naive"; by default "triton" on CUDA.

    Returns:
        int32 `[batch, num_heads, num_kv_blocks]` and `[batch, num_heads, num_kv_blocks, num_q_blocks]`, ascending
        unless `descending`; entries from the counts on are unspecified.
    """
    if counts.ndim != 3 or indices.shape[:-1] != counts.shape:
        raise ValueError(
            f"expected counts [batch, num_heads, num_q_blocks] and indices with one more dimension, "
            f"got {tuple(counts.shape)} and {tuple(indices.shape)}"
        )
    if resolve_backend(backend, counts.device) == "naive":
        return transpose_lists_naive(counts, indices, num_kv_blocks, descending)
    from sparse_hf_kernels.scoring.selection.launch import transpose_lists_triton

    return transpose_lists_triton(counts, indices, num_kv_blocks, descending)
