"""Sequence parallelism as the attention sees it: a slice of the sequence comes in, it serves some heads of all of it.

Ulysses (arXiv 2309.14509, section 3): each of P ranks holds a contiguous P-th of every row. Before the attention the
ranks trade slices of the sequence for slices of the heads, and back after it. What trades is a `HeadExchange`, which a
trainer puts on each layer's state; here is what each rank's heads follow and where the whole row's tokens stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparse_hf.forward_plan import ForwardPlan
from sparse_hf_kernels import AttentionLayout, layout_key

if TYPE_CHECKING:
    from sparse_hf.layer_state import LayerState
    from sparse_hf.methods import Method

_WHOLE = "whole_row"


class HeadExchange(Protocol):
    """What trades slices of the sequence for slices of the heads; the same object may serve all layers.

    Rank r of `size` attends the r-th part of the KV heads, in an order that the attention chooses (`head_order`), and
    their query heads; without an order `kv_head_range` says which.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def num_slices(self) -> int:
        """Parts of the row that the ranks bring: `size`, or 1 where something else put them together before."""

    @property
    def any_order(self) -> bool:
        """Ranks may take heads in any order; otherwise in their own."""

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Integers `[rows, seq_len / num_slices]` of all ranks as `[rows, seq_len]`."""

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, order: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, num_heads, seq_len / size, head_dim]` and k, v of all KV heads as this rank's heads of the row.

        `order` is `head_order`'s.

        Returns q `[batch, num_heads / size, seq_len, head_dim]` and k, v `[batch, len(order) / size, seq_len,
        head_dim]`, without an order those of `kv_head_range`. Differentiable, as is `to_sequence`; both pass on what
        was traded before.
        """

    def to_sequence(self, out: Tensor, order: tuple[int, ...] | None) -> Tensor:
        """The inverse for the output: `[batch, num_heads, seq_len / size, head_dim]`."""


def check_head_counts(num_heads: int, num_kv_heads: int, size: int) -> None:
    """Raises ValueError unless `size` ranks can share these heads evenly."""
    if size < 1 or num_heads % size:
        fitting = [n for n in range(2, num_heads + 1) if num_heads % n == 0 and _shares(num_kv_heads, n)]
        raise ValueError(
            f"sequence parallelism over {size} ranks needs a number of query heads that {size} divides, the model has "
            f"{num_heads}; use one of {fitting}"
        )
    if not _shares(num_kv_heads, size):
        fitting = [n for n in range(2, num_heads + 1) if num_heads % n == 0 and _shares(num_kv_heads, n)]
        raise ValueError(
            f"sequence parallelism over {size} ranks needs a number of KV heads that {size} divides or that divides "
            f"{size}, the model has {num_kv_heads}; use one of {fitting}"
        )


def _shares(num_kv_heads: int, size: int) -> bool:
    return num_kv_heads % size == 0 or size % num_kv_heads == 0


def kv_head_range(num_kv_heads: int, rank: int, size: int) -> range:
    """The KV heads of a rank; several ranks have the same one where there are more ranks than KV heads."""
    if size <= num_kv_heads:
        number = num_kv_heads // size
        return range(rank * number, (rank + 1) * number)
    head = rank * num_kv_heads // size
    return range(head, head + 1)


def head_order(layout: AttentionLayout, num_heads: int, size: int) -> tuple[int, ...] | None:
    """The heads of one rank after those of the other, so that each gets its part of dense and of sparse ones.

    Every layer waits for its slowest rank. Where a pattern's KV heads cannot be shared out evenly all are split: with f
    parts each, number n stands for part n % f of KV head n // f, which has an f-th of its query heads, and its keys and
    values whole. None for the heads' own order: where all follow one pattern, and with more ranks than KV heads.

    Args:
        layout: of all KV heads.
        num_heads: query heads.
        size: ranks.
    """
    num_kv_heads = layout.num_kv_heads
    if len(layout.groups) == 1 or size >= num_kv_heads:
        return None
    group = num_heads // num_kv_heads
    parts = [f for f in range(1, group + 1) if group % f == 0 and num_kv_heads * f % size == 0]
    even = [f for f in parts if all(len(heads) * f % size == 0 for _, heads in layout.groups)]
    f = (even or parts[-1:])[0]
    dealt = [head * f + part for _, heads in layout.groups for head in heads for part in range(f)]
    return tuple(number for rank in range(size) for number in sorted(dealt[rank::size]))


@dataclass
class _GateShare:
    """The gates of some heads. A class, so that models can be copied."""

    gate: Callable[[], Tensor | None]
    heads: Sequence[int]

    def __call__(self) -> Tensor | None:
        gate = self.gate()
        return None if gate is None else gate.narrow(0, self.heads[0], len(self.heads))


def layer_share(state: LayerState, num_heads: int) -> LayerState:
    """What this rank's heads of the layer follow, kept until the layer's own masks or gates are replaced.

    `num_heads` are the layer's query heads.
    """
    exchange = state.exchange
    assert exchange is not None
    source = (state.layout, state.full, state.sparse, state.gate, exchange)
    for known, share in state.kept_shares:
        if all(a is b for a, b in zip(known, source, strict=True)):
            return share
    num_kv_heads = state.layout.num_kv_heads
    heads: Sequence[int] = kv_head_range(num_kv_heads, exchange.rank, exchange.size)
    # Gates that are learned cost the same in all heads.
    order = head_order(state.layout, num_heads, exchange.size) if state.gate is None and exchange.any_order else None
    # Parts of a KV head count as heads: parameters per query head then fall to the right rank.
    numbers: Sequence[int] = heads if exchange.size <= num_kv_heads else (exchange.rank,)
    if order is not None:
        mine = len(order) // exchange.size
        numbers = order[exchange.rank * mine : (exchange.rank + 1) * mine]
        heads = [number * num_kv_heads // len(order) for number in numbers]

    def select(layout: AttentionLayout) -> AttentionLayout:
        picked = layout.select(heads)
        layout_key(picked)  # torch.compile finds it on the layout
        return picked

    share = replace(
        state,
        layout=select(state.layout),
        full=select(state.full),
        sparse=select(state.sparse),
        methods=_of(state.methods, heads),
        full_methods=_of(state.full_methods, heads),
        sparse_methods=_of(state.sparse_methods, heads),
        gate=None if state.gate is None else _GateShare(state.gate, heads),
        numbers=tuple(numbers),
        exchange=None,
        order=order,
    )
    # Two: a step may ask for the dense teacher's and the student's in turn.
    state.kept_shares = [(source, share), *state.kept_shares[:1]]
    return share


def _of(methods: tuple[Method, ...], heads: Sequence[int]) -> tuple[Method, ...]:
    return tuple(methods[head] for head in heads) if methods else ()


def whole_row(
    exchange: HeadExchange, plan: ForwardPlan, position_ids: Tensor | None
) -> tuple[ForwardPlan, Tensor | None]:
    """Plan and position ids `[batch or 1, seq_len]` of the whole row, gathered once per forward pass.

    Raises:
        ValueError: where tokens were seen before, which only a cache knows.
    """
    if _WHOLE not in plan.known:
        if isinstance(plan.q_offset, Tensor) or plan.q_offset or plan.kv_len != plan.q_len:
            raise ValueError(
                "sequence parallelism is for training and prefill without a cache; pass use_cache=False, or generate "
                "within sequence_parallel_disabled(model)"
            )
        mask, ids = plan.padding_mask, position_ids
        given = [x for x in (ids, mask) if x is not None]
        with torch.no_grad():
            found = exchange.gather_sequence(torch.cat([x.to(torch.int64) for x in given])) if given else None
        if ids is not None and found is not None:
            ids, found = found[: len(ids)], found[len(ids) :]
        if mask is not None and found is not None:
            mask = found.bool()
        seq_len = plan.q_len * exchange.num_slices
        whole = ForwardPlan(
            q_len=seq_len, kv_len=seq_len, q_offset=0, kv_offset=0, padding_mask=mask, device=plan.device
        )
        plan.known[_WHOLE] = whole, ids
    known: tuple[ForwardPlan, Tensor | None] = plan.known[_WHOLE]
    return known
