"""Attention of layers with dynamic methods: sequence by sequence, since each chooses its own blocks.

A batch is split into unpadded sequences (those of equal lengths go together), each method chooses for its heads, and
one call of `sparse_attention` serves all heads of the layer. Nothing here can be traced: compiled models break their
graph around it.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_hf.methods.base import Method
from sparse_hf.methods.dynamic import DynamicMethod, merge, put_heads, take_heads
from sparse_hf_kernels import UNBOUNDED, AttentionLayout, BlockSelection, HeadPattern, TokenPositions, sparse_attention
from sparse_hf_kernels.capture import may_read

if TYPE_CHECKING:
    from sparse_hf.call_record import BranchRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerHeads:
    """What KV heads of a layer follow.

    Args:
        layout: one pattern per head; those of dynamic methods are selected ones.
        methods: one per head.
        numbers: the heads' numbers in the layer; parameters per head go by them.
    """

    layout: AttentionLayout
    methods: tuple[Method, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, layout: AttentionLayout, methods: Sequence[Method]) -> LayerHeads:
        """All heads of a layer."""
        return cls(layout=layout, methods=tuple(methods), numbers=tuple(range(len(methods))))

    def select(self, heads: Sequence[int]) -> LayerHeads:
        """These KV heads alone, in the order given."""
        return LayerHeads(
            layout=self.layout.select(heads),
            methods=tuple(self.methods[head] for head in heads),
            numbers=tuple(self.numbers[head] for head in heads),
        )

    def check(self, num_heads: int) -> None:
        """Raises ValueError if dynamic methods cannot serve these heads of a layer of `num_heads` query heads."""
        dynamic = [method for method in dict.fromkeys(self.methods) if isinstance(method, DynamicMethod)]
        if dynamic and self.layout.max_distance < UNBOUNDED:
            raise ValueError(
                f"{dynamic[0].name} knows no sliding window, and the layer has one of its own of "
                f"{self.layout.max_distance} tokens; give such layers a static method by a rule"
            )
        if len(sizes := sorted({method.block_size for method in dynamic})) > 1:
            raise ValueError(f"the dynamic methods of a layer must share block_size, got {sizes}")
        for method in dynamic:
            method.check_heads(num_heads)


@lru_cache(maxsize=1024)
def without_selection(layout: AttentionLayout) -> AttentionLayout:
    """The layout with heads of selected patterns reading every key."""
    if not layout.selects:
        return layout
    dense = HeadPattern()
    return replace(layout, patterns=tuple(dense if p.selected else p for p in layout.patterns))


@torch.compiler.disable
def dynamic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: LayerHeads,
    *,
    positions: TokenPositions,
    scale: float,
    known: MutableMapping[str, Any] | None = None,
    records: Sequence[BranchRecord] = (),
) -> Tensor:
    """Sparse attention of a layer of which some heads choose by q and k; differentiable in q, k and v.

    Args:
        q: `[batch, num_heads, q_len, head_dim]`.
        k, v: `[batch, num_kv_heads, kv_len, head_dim]`.
        heads: of these KV heads.
        positions: where the tokens stand, padded or packed in any way.
        scale: factor on the scores.
        known: kept between the calls of one forward pass, so that only the first reads positions from the device. The
            keys of all these calls must stand at the same positions.
        records: told what is read.

    Returns:
        `[batch, num_heads, q_len, head_dim]`.

    Raises:
        ValueError: if keys of a sequence are missing, or a CUDA graph is captured and positions would have to be read.
    """
    if q.shape[2] <= 1 or not heads.layout.selects:
        layout = without_selection(heads.layout)
        for record in records:
            record.attended(layout, positions, len(q), heads.numbers)
        return sparse_attention(q, k, v, layout, positions=positions, scale=scale)
    if positions.offset is not None and positions.k_offset == 0:
        k, v = (x[:, :, : positions.offset + q.shape[2]] for x in (k, v))
        return attend_unpadded(q, k, v, heads, scale=scale, records=records)[0]
    known = {} if known is None else known
    if "sequences" not in known:
        known["sequences"] = split_sequences(positions, len(q))
    return _attend_split(q, k, v, heads, known["sequences"], scale, records)


@torch.compiler.disable
def attend_unpadded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: LayerHeads,
    *,
    scale: float,
    return_lse: bool = False,
    records: Sequence[BranchRecord] = (),
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output and, if asked for, log-sum-exp where the queries are the last of each row's unpadded keys.

    `records` are told what is read, and that the rows are these `sequences` of a batch.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    layout, selection = heads.layout, None
    if q_len <= 1 or not layout.selects or kv_len <= _dense_len(heads):
        layout = without_selection(layout)
    else:
        selection = select_blocks(q, k, heads, scale=scale)
    positions = TokenPositions.causal(q_len, kv_len, q.device)
    for record in records:
        record.attended(layout, positions, len(q), heads.numbers, selection, sequences)
    if return_lse:
        return sparse_attention(q, k, v, layout, positions=positions, selection=selection, scale=scale, return_lse=True)
    return sparse_attention(q, k, v, layout, positions=positions, selection=selection, scale=scale), None


def _dense_len(heads: LayerHeads) -> int:
    """Tokens up to which dynamic heads read every key: `min_seq_len`, and what the two forced blocks hold."""
    sizes = [method.block_size for method in heads.methods if isinstance(method, DynamicMethod)]
    return max(heads.layout.num_dense_rows, 2 * min(sizes, default=0))


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, heads: LayerHeads, *, scale: float) -> BlockSelection:
    """What the dynamic heads read in a call whose queries are the last of each row's unpadded keys."""
    group, q_offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    followers: dict[DynamicMethod, list[int]] = {}
    for head, method in enumerate(heads.methods):
        if isinstance(method, DynamicMethod):
            followers.setdefault(method, []).append(head)
    parts = []
    for method, kv_heads in followers.items():
        rows = [head * group + n for head in kv_heads for n in range(group)]
        numbers = [heads.numbers[head] * group + n for head in kv_heads for n in range(group)]
        # Kernels are launched on the current device, which need not be that of a layer of a model on several.
        with torch.cuda.device_of(q):
            chosen = method.select(
                take_heads(q, rows), take_heads(k, kv_heads), scale=scale, q_offset=q_offset, heads=numbers
            )
        parts.append((chosen, rows))
    selection = merge(parts, q.shape[1])
    return selection.with_dense_rows(heads.layout.num_dense_rows, q_offset)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Sequences of a batch that are alike: q_len new tokens after as many earlier ones.

    Args:
        queries: int64 `[num_sequences, q_len]`, slots of the flattened batch of queries.
        keys: int64 `[num_sequences, kv_len]`, slots of the flattened batch of keys; the queries are the last of them.
    """

    queries: Tensor
    keys: Tensor


def split_sequences(positions: TokenPositions, batch: int) -> list[Sequences]:
    """The sequences of a batch that have queries, in groups of equal lengths; reads the device once.

    Raises:
        ValueError: if tokens of a sequence are missing, or nothing may be read.
    """
    if not may_read():
        raise ValueError(
            "dynamic methods split padded and packed batches by what positions hold, which cannot be read while a CUDA "
            "graph is captured; leave attention_mask out if nothing is padded"
        )
    queries, keys = positions.q_positions, positions.k_positions
    device = queries.device
    q_segments, k_segments = positions.q_segments, positions.k_segments
    q_segments = torch.zeros_like(queries) if q_segments is None else q_segments
    k_segments = torch.zeros_like(keys) if k_segments is None else k_segments
    found = [x.expand(batch, -1).to(torch.int64) for x in (queries, q_segments, keys, k_segments)]
    tables = torch.cat(found, 1).cpu().split([x.shape[1] for x in found], 1)
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for row, (q_pos, q_seg, k_pos, k_seg) in enumerate(zip(*tables, strict=True)):
        for segment in q_seg[q_pos >= 0].unique().tolist():
            q_slots = ((q_pos >= 0) & (q_seg == segment)).nonzero().flatten()
            k_slots = ((k_pos >= 0) & (k_seg == segment)).nonzero().flatten()
            k_slots = k_slots[: int(q_pos[q_slots[-1]]) + 1]
            _check_complete(q_pos[q_slots], k_pos[k_slots])
            pair = q_slots + row * queries.shape[1], k_slots + row * keys.shape[1]
            alike.setdefault((len(q_slots), len(k_slots)), []).append(pair)
    return [
        Sequences(**{
            name: torch.stack(slots).to(device)
            for name, slots in zip(("queries", "keys"), zip(*pairs, strict=True), strict=True)
        })
        for pairs in alike.values()
    ]  # fmt: skip


def _check_complete(q_positions: Tensor, k_positions: Tensor) -> None:
    """Raises ValueError unless the keys stand at 0, 1, ... and the queries at the last of these positions."""
    expected = torch.arange(len(k_positions))
    if not torch.equal(k_positions, expected) or not torch.equal(q_positions, expected[-len(q_positions) :]):
        raise ValueError(
            "dynamic methods need every key of a sequence and its queries in order; got a cache that dropped keys, or "
            "positions that skip some"
        )


def _attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: LayerHeads,
    sequences: Sequence[Sequences],
    scale: float,
    records: Sequence[BranchRecord],
) -> Tensor:
    """Padding gives 0."""
    batch, _, q_len, _ = q.shape
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    parts = []
    for group in sequences:
        inputs = _gather(flat_q, group.queries), _gather(flat_k, group.keys), _gather(flat_v, group.keys)
        out, _ = attend_unpadded(*inputs, heads, scale=scale, records=records, sequences=group)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = flat_v.new_zeros(batch * q_len, q.shape[1], v.shape[3])
    if parts:
        out = out.index_copy(0, torch.cat([group.queries.flatten() for group in sequences]), torch.cat(parts))
    return out.unflatten(0, (batch, q_len)).transpose(1, 2)


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """x `[batch * length, heads, head_dim]` at slots `[n, len]`, as `[n, heads, len, head_dim]`."""
    return x.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)


@torch.compiler.disable
def dynamic_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    full: LayerHeads,
    sparse: LayerHeads,
    *,
    positions: TokenPositions,
    scale: float,
    skip_saturated: bool = False,
    known: MutableMapping[str, Any] | None = None,
    records: tuple[Sequence[BranchRecord], Sequence[BranchRecord]] = ((), ()),
) -> Tensor:
    """`sparse_hf_kernels.mixed_attention` where a branch has dynamic heads.

    `known` and, for each branch, `records` are those of `dynamic_attention`.
    """
    num_kv_heads, group = len(gate), q.shape[1] // len(gate)
    values = gate.tolist() if skip_saturated else [None] * num_kv_heads
    z = gate.float().repeat_interleave(group, output_size=q.shape[1])[:, None, None]
    total = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float32, device=q.device)
    for branch, weight, left_out, told in ((full, z, 0, records[0]), (sparse, 1 - z, 1, records[1])):
        picked = [head for head in range(num_kv_heads) if values[head] != left_out]
        if not picked:
            continue
        rows = [head * group + n for head in picked for n in range(group)]
        inputs = take_heads(q, rows), take_heads(k, picked), take_heads(v, picked), branch.select(picked)
        out = dynamic_attention(*inputs, positions=positions, scale=scale, known=known, records=told).float()
        out = out if len(picked) == num_kv_heads else put_heads(out, rows, q.shape[1])
        total = total + weight * out
    return total.to(q.dtype)
