"""How the KV heads of a layer keep their keys, and which of them a new query reads.

A head is *linear*, the token at position p lying in slot p, or a *ring*: its sinks in the first slots, then the last
`recent` tokens, each in the place of the one that it pushed out. Only real tokens are stored, so that the number of a
row's tokens alone says what each slot holds: no positions are kept, and padding takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from sparse_hf_kernels.layout import UNBOUNDED


@dataclass(frozen=True, kw_only=True)
class HeadStorage:
    """One KV head.

    Args:
        recent: tokens that a ring keeps besides its sinks; None for a linear head.
        num_sink_tokens: a query reads positions below it; a ring keeps them.
        window: of linear heads, a query reads distances below it. Rings hold nothing else.
    """

    recent: int | None = None
    num_sink_tokens: int = 0
    window: int = UNBOUNDED

    @property
    def ring(self) -> tuple[int, int] | None:
        """(recent, sinks) of a ring; heads of equal ones lie together."""
        return None if self.recent is None else (self.recent, self.num_sink_tokens)

    @property
    def ring_slots(self) -> int:
        return 0 if self.recent is None else self.recent + self.num_sink_tokens


@dataclass(frozen=True, kw_only=True)
class StorageGroup:
    """KV heads whose slots lie together in each row, `[heads, slots]`.

    Args:
        heads: their numbers, ascending.
        ring: (recent, sinks); None for linear heads.
        first_slot: where the group begins in a row.
    """

    heads: tuple[int, ...]
    ring: tuple[int, int] | None
    first_slot: int

    def slots(self, capacity: int) -> int:
        """Slots of each head; `capacity` is that of linear heads."""
        return capacity if self.ring is None else sum(self.ring)


@dataclass(frozen=True, kw_only=True)
class StorageLayout:
    """The KV heads of a layer. In memory rings come first, so that growing linear heads move nothing else.

    Args:
        heads: one per KV head.
        num_dense_rows: queries at positions below it read every key of linear heads.
        max_distance: keys at this distance or more are never read, sinks neither.
    """

    heads: tuple[HeadStorage, ...]
    num_dense_rows: int = 0
    max_distance: int = UNBOUNDED

    def __post_init__(self) -> None:
        for head in self.heads:
            if head.recent is not None and head.recent >= self.max_distance:
                raise ValueError(
                    f"a ring holds what a query reads besides itself, fewer than max_distance={self.max_distance} "
                    f"tokens, got recent={head.recent}"
                )

    @cached_property
    def groups(self) -> tuple[StorageGroup, ...]:
        """In the order in which they lie in memory."""
        members: dict[tuple[int, int] | None, list[int]] = {}
        for number, head in enumerate(self.heads):
            members.setdefault(head.ring, []).append(number)
        linear = members.pop(None, None)
        found, slot = [], 0
        for ring, numbers in members.items():
            assert ring is not None
            found.append(StorageGroup(heads=tuple(numbers), ring=ring, first_slot=slot))
            slot += len(numbers) * sum(ring)
        if linear is not None:
            found.append(StorageGroup(heads=tuple(linear), ring=None, first_slot=slot))
        return tuple(found)

    @cached_property
    def ring_slots(self) -> int:
        """Slots of all rings of a row."""
        return sum(head.ring_slots for head in self.heads)

    @cached_property
    def num_linear(self) -> int:
        return sum(head.recent is None for head in self.heads)

    @property
    def is_linear(self) -> bool:
        """All heads are: tokens that come one after the other are stored by a plain copy."""
        return self.num_linear == len(self.heads)

    def row_slots(self, capacity: int) -> int:
        """Slots of a row whose linear heads have `capacity` each."""
        return self.ring_slots + self.num_linear * capacity

    def places(self) -> list[int]:
        """Per head: the first slot of a ring, or which of the linear heads it is."""
        places = [0] * len(self.heads)
        for group in self.groups:
            for index, number in enumerate(group.heads):
                places[number] = index if group.ring is None else group.first_slot + index * sum(group.ring)
        return places


@lru_cache(maxsize=1024)
def head_table(layout: StorageLayout, device: torch.device) -> Tensor:
    """What kernels read of each head: int32 `[num_kv_heads, 4]`: recent (-1: linear), sinks, window, place."""
    rows = [
        (-1 if head.recent is None else head.recent, head.num_sink_tokens, min(head.window, layout.max_distance), place)
        for head, place in zip(layout.heads, layout.places(), strict=True)
    ]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device)


def slot_positions(ring: tuple[int, int] | None, num_slots: int, lengths: Tensor) -> Tensor:
    """Position of the token in each slot of a head, -1 for empty ones: int64 `[batch, num_slots]`.

    Args:
        ring: (recent, sinks); None for a linear head.
        lengths: `[batch]` tokens stored so far.
    """
    slots = torch.arange(num_slots, device=lengths.device)[None]
    lengths = lengths.to(torch.int64)[:, None]
    if ring is None:
        return torch.where(slots < lengths, slots, -1)
    recent, sinks = ring
    # Of the positions that share the slot, the last one below the length. Slots that are not filled yet give theirs.
    behind = (lengths - 1 - slots).remainder(max(recent, 1))
    position = torch.where((slots < sinks) | (lengths <= slots), slots, lengths - 1 - behind)
    return torch.where(position < lengths, position, -1)
