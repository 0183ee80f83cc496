"""Where each query row's sequence begins and ends among the keys: the positions as kernels read them.

A kernel compares coordinates. As a rule a key's coordinate is its slot `j`, and a row knows the slot of its own key
and the slot where its sequence starts: left and right padding, packing and chunked prefill need no more. Only where
tokens are missing between others (an evicted cache, padding amid a sequence) are key coordinates read from memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf_kernels.capture import may_read
from sparse_hf_kernels.positions import TokenPositions

EMPTY_ROW = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class RowGeometry:
    """Coordinates of queries and keys.

    Args:
        q_len, kv_len: slots of queries and keys.
        offset, start: closed form, when the tensors are None: row i stands at `i + offset` and its sequence begins at
            `start` (which is negative where a cache dropped the oldest keys).
        q_start, q_pos: int32 `[batch or 1, q_len]`: where a row's sequence begins and where the row stands. A row
            without token has `q_pos` -1 and `q_start` 0.
        q_end: int32, same shape: one past the last key of the row's sequence. Read without causality only.
        k_pos: int32 `[batch or 1, kv_len]` coordinates of the keys, -1 for empty slots; None when they are the slots.
        empty_keys: boolean `[batch or 1, kv_len]`, slots that no query may read whatever lies in them; None if none.
    """

    q_len: int
    kv_len: int
    offset: int = 0
    start: int = 0
    q_start: Tensor | None = None
    q_pos: Tensor | None = None
    q_end: Tensor | None = None
    k_pos: Tensor | None = None
    empty_keys: Tensor | None = None

    @property
    def is_closed_form(self) -> bool:
        return self.q_pos is None

    @property
    def batch(self) -> int:
        """Rows of the tensors: 1 when all rows of the batch are alike."""
        return 1 if self.q_pos is None else len(self.q_pos)

    @classmethod
    def of(cls, positions: TokenPositions) -> RowGeometry:
        """The geometry of a batch; reads one flag from the device, once, unless the positions have a closed form."""
        known = positions.__dict__.get("_row_geometry")
        if known is None:
            known = positions.__dict__["_row_geometry"] = cls._of(positions)
        return known

    @classmethod
    def _of(cls, positions: TokenPositions) -> RowGeometry:
        if positions.offset is not None:
            q_len, kv_len = positions.q_len, positions.kv_len
            return cls(
                q_len=q_len, kv_len=kv_len, offset=positions.offset - positions.k_offset, start=-positions.k_offset
            )
        if may_read():
            slotted, is_right = _in_slots(positions)
            if bool(is_right):
                return slotted
        # Reading coordinates is right for every batch.
        return _in_coordinates(positions)

    def to(self, device: torch.device) -> RowGeometry:
        """The geometry with its tensors on a device; itself if they are there."""
        if self.q_pos is None or self.q_pos.device == device:
            return self

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return replace(
            self,
            q_start=move(self.q_start),
            q_pos=move(self.q_pos),
            q_end=move(self.q_end),
            k_pos=move(self.k_pos),
            empty_keys=move(self.empty_keys),
        )


def _in_slots(positions: TokenPositions) -> tuple[RowGeometry, Tensor]:
    """The geometry if key coordinates are slots, and a boolean scalar that tells whether they are.

    They are when every token but the first of its sequence directly follows its predecessor.
    """
    q_pos, k_pos = positions.q_positions, positions.k_positions
    q_len, kv_len = q_pos.shape[1], k_pos.shape[1]
    valid = k_pos >= 0
    follows = k_pos[:, 1:] == k_pos[:, :-1] + 1
    if positions.k_segments is not None:
        follows = follows & (positions.k_segments[:, 1:] == positions.k_segments[:, :-1])
    follows = F.pad(follows & valid[:, :-1], (1, 0))
    good = (~valid | (k_pos == 0) | (valid.cumsum(-1) == 1) | follows).all()
    slots = torch.arange(kv_len, device=k_pos.device)
    starts = slots - k_pos
    if positions.q_segments is None:
        # An extra column, so that no key at all has a minimum too.
        start = F.pad(starts.masked_fill(~valid, kv_len), (0, 1), value=kv_len).amin(-1, keepdim=True)
        end = F.pad(torch.where(valid, slots + 1, 0), (0, 1)).amax(-1, keepdim=True)
        rows = q_pos + start
        q_start, q_end = start.expand_as(rows), end.expand_as(rows)
    else:
        assert positions.k_segments is not None
        own = slice(kv_len - q_len, kv_len)
        batch = max(len(q_pos), len(k_pos))
        q_pos = q_pos.expand(batch, -1)
        good = good & (q_len <= kv_len)
        if q_len <= kv_len:
            good = good & (k_pos[:, own] == q_pos).all()
            good = good & (positions.k_segments[:, own] == positions.q_segments).all()
            rows, q_start = slots[own].expand(batch, -1), starts[:, own].expand(batch, -1)
            q_end = _segment_ends(positions.k_segments, valid)[:, own].expand(batch, -1)
        else:
            rows = q_start = q_end = q_pos
    return _geometry(positions, q_pos, rows, q_start, q_end, None), good


def _segment_ends(segments: Tensor, valid: Tensor) -> Tensor:
    """For each slot, one past the last slot of its segment `[batch, kv_len]`."""
    length = segments.shape[1]
    slots = torch.arange(length, device=segments.device)
    last = F.pad((segments[:, 1:] != segments[:, :-1]) | ~valid[:, 1:], (0, 1), value=True)
    # The nearest border at or after each slot: a running minimum from the right.
    return torch.where(last, slots + 1, length).flip(-1).cummin(-1).values.flip(-1)


def _in_coordinates(positions: TokenPositions) -> RowGeometry:
    """The geometry with key coordinates of their own: position, plus where the packed sequence begins."""
    q_pos, k_pos = positions.q_positions, positions.k_positions
    if positions.q_segments is None or positions.k_segments is None:
        start = torch.zeros_like(q_pos)
        end = (k_pos.amax(-1, keepdim=True) + 1 if k_pos.shape[1] else k_pos.new_zeros(len(k_pos), 1)).expand(
            max(len(q_pos), len(k_pos)), q_pos.shape[1]
        )
        return _geometry(positions, q_pos, q_pos, start, end, k_pos)
    batch = max(len(q_pos), len(k_pos))
    k_pos, kv_len = k_pos.expand(batch, -1), k_pos.shape[1]
    q_segments, k_segments = _numbered(positions.q_segments, positions.k_segments, batch)
    # Sequences follow each other in memory, so a sequence's first slot keeps its coordinates clear of the next one's.
    slots = torch.arange(kv_len, device=k_pos.device).expand_as(k_pos)
    slots = slots.masked_fill(k_pos < 0, kv_len)
    base = torch.full((batch, kv_len + 1), kv_len, device=k_pos.device).scatter_reduce(1, k_segments, slots, "amin")
    keys = torch.where(k_pos >= 0, k_pos + base.gather(1, k_segments), -1)
    ends = torch.zeros_like(base).scatter_reduce(1, k_segments, keys + 1, "amax")
    start = base.gather(1, q_segments)
    return _geometry(positions, q_pos.expand(batch, -1), q_pos + start, start, ends.gather(1, q_segments), keys)


def _numbered(q_segments: Tensor, k_segments: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Segments by numbers below the number of keys, which is that of queries whose segment has no key.

    The segments' own numbers have no bound that is known without reading them.
    """
    q_segments, k_segments = (x.expand(batch, -1).contiguous() for x in (q_segments, k_segments))
    kv_len = k_segments.shape[1]
    ascending = k_segments.sort(-1).values

    def number(segments: Tensor) -> Tensor:
        first = torch.searchsorted(ascending, segments)
        exists = ascending.gather(1, first.clamp_max(kv_len - 1)) == segments
        return torch.where(exists, first, kv_len)

    return number(q_segments), number(k_segments)


def _geometry(
    positions: TokenPositions, q_pos: Tensor, rows: Tensor, q_start: Tensor, q_end: Tensor, k_pos: Tensor | None
) -> RowGeometry:
    """Packs int32 tensors; rows that hold no token (`q_pos` -1) are marked."""
    batch = max(len(rows), len(positions.k_positions))
    token = (q_pos >= 0).expand(batch, -1)

    def pack(x: Tensor, empty: int) -> Tensor:
        return torch.where(token, x.expand(batch, -1), empty).to(torch.int32).contiguous()

    return RowGeometry(
        q_len=positions.q_positions.shape[1],
        kv_len=positions.k_positions.shape[1],
        q_start=pack(q_start, 0),
        q_pos=pack(rows, EMPTY_ROW),
        q_end=pack(q_end, 0),
        k_pos=None if k_pos is None else k_pos.expand(batch, -1).to(torch.int32).contiguous(),
        empty_keys=positions.k_positions < 0,
    )
