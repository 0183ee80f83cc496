"""The order in which tiles are launched: heads that share the cache together, long tiles first."""

from __future__ import annotations

import torch
from torch import Tensor

L2_BYTES = 32 * 2**20
"""What tiles in flight may share in the cache; the heads beyond it come later."""

PARTIAL_COST, TILE_COST = 11, 13
"""A masked block, and a tile's start and end, in tenths of a full block."""

SELECTED_SHARE = 0.2
"""Of a dense head's work, what a selected one is taken to have."""

MIN_PART = 32
"""Steps in a part at least: its result takes a write and a read of fp32 sums."""


def launch_order(rows: Tensor, pattern_of_head: Tensor, *, batch: int, group: int, shared_bytes: int) -> Tensor:
    """The schedule of a table.

    KV heads form sections whose shared data fits the cache, costly sections first. Within a section tiles go from
    long to short; equal ones alternate between the heads, so that those which read the same blocks run together.

    Args:
        rows: `[patterns, batch or 1, num_tiles, ROW_INTS]`.
        pattern_of_head: `[num_kv_heads]`, which pattern a KV head follows.
        batch: rows of the batch.
        group: heads per KV head that have tiles of their own.
        shared_bytes: what the tiles of one KV head share.

    Returns:
        int32 `[batch * num_kv_heads * group * num_tiles, 2]`: row of the flattened table, and
        `batch index * num_kv_heads * group + head`.
    """
    num_patterns, table_batch, num_tiles, _ = rows.shape
    num_kv_heads, device = len(pattern_of_head), rows.device
    cost = _cost(rows)  # [patterns, batch or 1, num_tiles]
    row = torch.arange(num_patterns * table_batch * num_tiles, device=device).view(cost.shape)
    cost, row = (x[pattern_of_head].transpose(0, 1).expand(batch, -1, -1).flatten(0, 1) for x in (cost, row))
    units = batch * num_kv_heads
    total = cost.sum(-1)
    rank = torch.empty_like(total)
    rank[torch.sort(total, descending=True, stable=True).indices] = torch.arange(units, device=device)
    section = rank // max(1, L2_BYTES // max(1, shared_bytes))  # [units]
    key = section[:, None] * (cost.amax() + 1) - cost  # [units, num_tiles]
    # Enumerated as [tile, unit, head of the group], last tiles first; the stable sort keeps that among equal keys.
    key = key.T.flip(0)[:, :, None].expand(-1, -1, group).reshape(-1)
    row = row.T.flip(0)[:, :, None].expand(-1, -1, group).reshape(-1)
    head = torch.arange(units * group, device=device).expand(num_tiles, -1).reshape(-1)
    order = torch.sort(key, stable=True).indices
    return torch.stack((row[order], head[order]), -1).to(torch.int32)


def _cost(rows: Tensor) -> Tensor:
    num_full, num_blocks = rows[..., 3], rows[..., 7]
    return 10 * num_full + PARTIAL_COST * (num_blocks - num_full) + TILE_COST


def order_of_heads(fixed: Tensor, pattern_of_head: Tensor, batch: int, *, transposed: bool) -> Tensor:
    """The schedule of a table some of whose heads are selected per call: head after head, costly ones first.

    How long a selected head's tiles are is known on the device alone. They go as those of a dense head would, after
    the heads that cost more than `SELECTED_SHARE` of one.

    Args:
        fixed: `[patterns, num_tiles, ROW_INTS]`.
        pattern_of_head: `[units, members]`: pattern of each head, -1 for selected ones. A tile belongs to a unit (a
            query head, or a KV head when transposed) and walks the rows of all its members.
        batch: rows of the batch.

    Returns:
        As `launch_order`; rows are numbered `[batch, units, members, num_tiles]`.
    """
    units, members = pattern_of_head.shape
    if not transposed:
        pattern_of_head, units, members = pattern_of_head.view(-1, 1), units * members, 1
    num_tiles = fixed.shape[1]
    dense = torch.arange(num_tiles, 0, -1) if transposed else torch.arange(1, num_tiles + 1)
    cost = _cost(fixed.long())[pattern_of_head.clamp_min(0)]  # [units, members, num_tiles]
    cost = torch.where((pattern_of_head < 0)[..., None], (10 * SELECTED_SHARE * dense).long() + TILE_COST, cost).sum(1)
    cost = cost.repeat(batch, 1)
    order = cost.sum(-1).argsort(descending=True, stable=True)
    # Of equal ones the last comes first.
    tile = num_tiles - 1 - cost[order].flip(-1).argsort(dim=-1, descending=True, stable=True)
    head = order[:, None].expand_as(tile)
    row = head * (members * num_tiles) + tile
    return torch.stack((row.flatten(), head.flatten()), -1).to(torch.int32)


def cut(
    rows: Tensor, schedule: Tensor, group: int, num_programs: int, unknown: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Cuts backward tiles that are longer than an even share of the work, so that no CTA outlasts the others.

    Args:
        rows: int32 `[num_rows, ROW_INTS]`.
        schedule: int32 `[num_tiles, 2]`.
        group: query heads per KV head, which walk the same row one after another.
        num_programs: CTAs that run at a time.
        unknown: boolean `[num_tiles]`, those tiles of the schedule that the device alone knows the lengths of. Their
            rows have upper bounds. The first of a head (sinks, which most queries read) are cut by these, whatever
            comes of the parts; the others stay whole.

    Returns:
        The schedule int32 `[num_parts, 8]`, the cut tiles int32 `[cut tiles, 4]`, and the number of slots.
    """
    tiles = rows[schedule[:, 0].long(), 0]
    steps = rows[schedule[:, 0].long(), 7].long()
    whole = torch.zeros_like(steps, dtype=torch.bool) if unknown is None else unknown & (tiles > 0)
    work = steps * group
    # Tiles of unknown length may be short: they do not count, so that the first of a head are cut rather too small.
    share = int(work.masked_fill(whole, 0).sum()) // num_programs + 1
    parts = torch.ones_like(work)
    if len(work) and int(work.max()) > share:
        size = max(MIN_PART, share // 2)
        parts = torch.where((work > share) & ~whole, -(-work // size), 1).clamp_min(1)
    which = torch.arange(len(work), device=work.device).repeat_interleave(parts)
    before = parts.cumsum(0) - parts
    part = torch.arange(len(which), device=work.device) - before[which]
    size_of = -(-work // parts)[which]
    begin = part * size_of
    end = torch.minimum(begin + size_of, work[which])
    steps_of = steps[which].clamp_min(1)
    is_cut = parts > 1
    slots = torch.where(is_cut, parts, 0)
    first_slot = slots.cumsum(0) - slots
    slot = torch.where(is_cut[which], first_slot[which] + part, -1)
    last = (end - 1).clamp_min(0)
    columns = (
        begin // steps_of, torch.where(end > begin, last // steps_of + 1, begin // steps_of), begin % steps_of,
        last % steps_of + 1, slot, torch.zeros_like(slot),
    )  # fmt: skip
    cut_schedule = torch.cat([schedule[which], torch.stack(columns, -1).to(torch.int32)], -1).contiguous()
    splits = torch.stack((tiles, schedule[:, 1], first_slot.to(torch.int32), parts.to(torch.int32)), -1)
    return cut_schedule, splits[is_cut].contiguous(), int(slots.sum())
