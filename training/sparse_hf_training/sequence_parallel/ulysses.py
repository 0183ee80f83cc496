"""Ulysses' exchange (arXiv 2309.14509, section 3.1) with grouped-query heads: keys and values travel unrepeated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_hf_training.sequence_parallel.collectives import all_gather, all_to_all
from sparse_hf_training.sequence_parallel.groups import SequenceGroup


@lru_cache(maxsize=1024)
def _head_index(order: tuple[int, ...], group: int, device: torch.device) -> Tensor:
    """The query heads of KV heads in this order, `group` each, on the device."""
    with torch.inference_mode(False):
        return torch.tensor([head * group + n for head in order for n in range(group)], device=device)


@dataclass(frozen=True)
class UlyssesExchange:
    """A `sparse_hf.head_exchange.HeadExchange` over a group: one collective before the attention, one after it.

    What travels has the layout `[rank, token, batch, head, head_dim]`, so that nothing is copied on arrival: q, k and v
    are views of what came, in the memory order in which models make them.
    """

    group: SequenceGroup

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def num_slices(self) -> int:
        return self.group.size

    @property
    def any_order(self) -> bool:
        return True

    def gather_sequence(self, x: Tensor) -> Tensor:
        return all_gather(x, self.size, self.group.name).transpose(0, 1).flatten(1)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, order: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        num_kv_heads = k.shape[1]
        if order is not None:
            # Query heads go with their KV head, or with the part of it that they are.
            q = q.index_select(1, _head_index(order, q.shape[1] // len(order), q.device))
            heads = tuple(number * num_kv_heads // len(order) for number in order)
            k, v = (x.index_select(1, _head_index(heads, 1, x.device)) for x in (k, v))
        elif num_kv_heads < self.size:
            # A KV head goes to several ranks; its gradient is the sum of theirs.
            k, v = (x.repeat_interleave(self.size // num_kv_heads, dim=1) for x in (k, v))
        sent = torch.cat([self._by_rank(x) for x in (q, k, v)], dim=3)
        came = all_to_all(sent, self.size, self.group.name).flatten(0, 1)
        mine = k.shape[1] // self.size
        parts = came.split([q.shape[1] // self.size, mine, mine], dim=2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in parts)
        return q, k, v

    def to_sequence(self, out: Tensor, order: tuple[int, ...] | None) -> Tensor:
        sent = out.permute(2, 0, 1, 3).unflatten(0, (self.size, -1))
        came = all_to_all(sent, self.size, self.group.name)
        # [rank, token, batch, head, head_dim] to [batch, token, all heads, head_dim], the attention function's order.
        heads = came.permute(2, 1, 0, 3, 4).flatten(2, 3)
        if order is not None:
            back = tuple(order.index(head) for head in range(len(order)))
            heads = heads.index_select(2, _head_index(back, heads.shape[2] // len(order), heads.device))
        return heads.transpose(1, 2)

    def _by_rank(self, x: Tensor) -> Tensor:
        """`[batch, heads, tokens, head_dim]` as `[rank, tokens, batch, heads / size, head_dim]`, a view."""
        return x.unflatten(1, (self.size, -1)).permute(1, 3, 0, 2, 4)
