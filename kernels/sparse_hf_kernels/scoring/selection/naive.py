"""Block selection and list transposition in plain torch: the definition that the kernels are judged by."""

from __future__ import annotations

import torch
from torch import Tensor


def _forced(mass: Tensor, first_block: int, keep_sink: bool, keep_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Which blocks may be kept (causal) and which must be; boolean `[nq, nk]`."""
    num_q, num_kv = mass.shape[-2:]
    columns = torch.arange(num_kv, device=mass.device)
    diagonal = torch.arange(first_block, first_block + num_q, device=mass.device)[:, None]
    causal = columns <= diagonal
    forced = ((columns == 0) & keep_sink) | ((columns == diagonal) & keep_diagonal)
    return causal, forced & causal


def _compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending positions of the true entries along the last dimension, int32."""
    order = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return keep.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _ranked(mass: Tensor, causal: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the blocks of each row: forced ones, then the largest first, ties by index; and the sorted forced."""
    rank = mass.float().masked_fill(~causal, float("-inf")).masked_fill(forced, float("inf"))
    order = rank.argsort(dim=-1, descending=True, stable=True)
    return order, forced.expand_as(mass).gather(-1, order)


def select_top_p_naive(
    mass: Tensor, threshold: Tensor, first_block: int, keep_sink: bool, keep_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """See `select_top_p`; `threshold [Hq]`."""
    causal, forced = _forced(mass, first_block, keep_sink, keep_diagonal)
    order, is_forced = _ranked(mass, causal, forced)
    mass = mass.double().masked_fill(~causal, 0.0)
    sorted_mass = mass.gather(-1, order)
    before = sorted_mass.cumsum(-1) - sorted_mass
    share = threshold[:, None, None]
    target = share * mass.sum(-1, keepdim=True).float()  # rounded once, as on the device
    missing = (before < target) | (share >= 1)
    keep_sorted = (missing | is_forced) & causal.expand_as(mass).gather(-1, order)
    return _compact(torch.zeros_like(keep_sorted).scatter(-1, order, keep_sorted))


def select_top_k_naive(
    scores: Tensor, k: Tensor, first_block: int, keep_sink: bool, keep_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """See `select_top_k`; `k [Hq]`."""
    causal, forced = _forced(scores, first_block, keep_sink, keep_diagonal)
    order, is_forced = _ranked(scores, causal, forced)
    wanted = torch.arange(scores.shape[-1], device=scores.device) < k[:, None, None]
    keep_sorted = (wanted | is_forced) & causal.expand_as(scores).gather(-1, order)
    return _compact(torch.zeros_like(keep_sorted).scatter(-1, order, keep_sorted))


def transpose_lists_naive(
    counts: Tensor, indices: Tensor, num_kv_blocks: int, descending: bool
) -> tuple[Tensor, Tensor]:
    """See `transpose_lists`."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    listed = slots < counts[..., None]
    # Unlisted slots hold anything: send them to a column that is cut off.
    columns = torch.where(listed, indices, num_kv_blocks).long()
    mask = torch.zeros(*counts.shape, num_kv_blocks + 1, dtype=torch.bool, device=indices.device)
    mask = mask.scatter(-1, columns, True)[..., :num_kv_blocks]
    if not descending:
        return _compact(mask.transpose(-1, -2))
    counts, rows = _compact(mask.transpose(-1, -2).flip(-1))
    return counts, mask.shape[-2] - 1 - rows
