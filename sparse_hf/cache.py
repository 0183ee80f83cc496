"""`SparseCache`: full heads keep every key, sparse heads keep their sinks and window and free the rest.

KV heads that keep the same keys form a group with tensors of its own length, so the memory of evicted keys is really
returned. Each stored key carries its position, so padding and eviction need no further bookkeeping.

transformers' attention modules call `update` and pass what it returns to the attention function. The layers here return
a `PendingKV`: the new keys, not yet stored, since only the attention function learns their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from sparse_hf.forward_plan import ForwardPlan
from sparse_hf_kernels import UNBOUNDED, AttentionLayout, HeadPattern, TokenPositions


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which keys a group of heads must keep: sinks and the last `recent`, or all when `recent` is None."""

    recent: int | None = None
    num_sink_tokens: int = 0

    @property
    def capacity(self) -> int:
        return UNBOUNDED if self.recent is None else self.recent + self.num_sink_tokens

    def kept_tokens(self, seq_len: int, num_dense_rows: int = 0) -> int:
        """Keys held per head after `seq_len` tokens; while a dense row may come, all of them."""
        return seq_len if seq_len < num_dense_rows else min(seq_len, self.capacity)


def retention_groups(layout: AttentionLayout, per_head: bool = True) -> list[tuple[Retention, tuple[int, ...]]]:
    """The layout's KV heads, grouped by what their cache must keep; `per_head=False` keeps everything for all."""
    groups: dict[Retention, list[int]] = {}
    for pattern, heads in layout.groups:
        window = min(_reach(pattern), layout.max_distance)
        if not per_head or window == UNBOUNDED:
            retention = Retention()
        else:
            # The next query reads itself and window - 1 earlier keys.
            retention = Retention(recent=window - 1, num_sink_tokens=pattern.num_sink_tokens)
            if retention.capacity >= layout.max_distance - 1:
                # The model's own window holds no more than that, and sinks before it are out of reach.
                retention = Retention(recent=layout.max_distance - 1)
        groups.setdefault(retention, []).extend(heads)
    return [(retention, tuple(sorted(heads))) for retention, heads in groups.items()]


def _reach(pattern: HeadPattern) -> int:
    """Keys at this distance or more are not read, sinks apart."""
    if pattern.num_last_tokens:
        return UNBOUNDED  # the next query is a last row
    if pattern.blocks is not None:
        return pattern.blocks.reach or UNBOUNDED
    return pattern.window


@lru_cache(maxsize=1024)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads on the device, one tensor for all layers and caches: each copy there would be waited for."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


@dataclass(kw_only=True, eq=False)
class HeadGroup:
    """Stored keys and values of some KV heads: `[batch, heads, length, head_dim]`, positions `[batch, length]`.

    `first` is the position of the first key, the others following it, in all rows alike; None where that does not hold.
    `index` holds `heads` on the device: a list would be copied there, and waited for, at every use.
    """

    retention: Retention
    heads: tuple[int, ...]
    index: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    first: int | None = 0

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Takes the new tokens of all KV heads `[batch, num_kv_heads, new, head_dim]` and stores this group's."""
        if len(self.heads) < keys.shape[1]:
            keys, values = keys.index_select(1, self.index), values.index_select(1, self.index)
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        self.positions = torch.cat([self.positions, positions], 1)

    def token_positions(self, q_positions: Tensor, seen: int) -> TokenPositions:
        """Of queries at `q_positions [batch, q_len]` and the stored keys; `seen` slots came before the queries."""
        if self.first is None:
            return TokenPositions(q_positions=q_positions, k_positions=self.positions)
        q_len, kv_len = q_positions.shape[1], self.positions.shape[1]
        return TokenPositions.causal(q_len, kv_len, q_positions.device, q_offset=seen, k_offset=self.first)

    def evict(self, lengths: Tensor) -> None:
        """Frees what no query at a position >= `lengths [batch]` can read."""
        capacity = self.retention.capacity
        if self.retention.recent is None or self.keys.shape[2] <= capacity:
            return
        recent = self.positions >= (lengths - self.retention.recent)[:, None]
        keep = (self.positions >= 0) & (recent | (self.positions < self.retention.num_sink_tokens))
        # Kept slots first, in order. Rows that keep fewer fill up with slots that are marked empty.
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :capacity]
        self.positions = self.positions.gather(1, order).masked_fill(~keep.gather(1, order), -1)
        if self.first is not None:
            self.first = None if self.retention.num_sink_tokens else self.first + self.keys.shape[2] - capacity
        index = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys = self.keys.gather(2, index)
        self.values = self.values.gather(2, index)

    def apply(self, change: Any) -> None:
        """Replaces the three tensors by `change(tensor)`."""
        self.keys, self.values, self.positions = change(self.keys), change(self.values), change(self.positions)


class PendingKV:
    """New keys and values on their way from a cache layer to the sparse attention function."""

    def __init__(self, layer: SparseCacheLayer, keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def store(self, plan: ForwardPlan, position_ids: Tensor | None) -> list[tuple[HeadGroup, TokenPositions]]:
        """Appends the new tokens; returns the groups to attend to, and where queries and keys stand."""
        return self.layer.store(self.keys, self.values, plan, position_ids)

    def release(self) -> None:
        """Frees what later queries cannot read. Call it once the attention is done."""
        self.layer.release()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a SparseCache was given to an attention that is not sparse (it asked for {name!r}); "
            "use DynamicCache inside `with dense(model)` or after `unsparsify`"
        )


class SparseCacheLayer(CacheLayerMixin):
    """One layer's groups of heads."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, layout: AttentionLayout, per_head: bool = True) -> None:
        super().__init__()
        self.layout = layout
        self.retentions = retention_groups(layout, per_head)
        self.num_dense_rows = layout.num_dense_rows
        self.past_dense_rows = not layout.num_dense_rows
        self.num_tokens = 0
        self.lengths: Tensor | None = None  # real tokens seen, [batch]
        self.groups: list[HeadGroup] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, _, head_dim = key_states.shape
        self.lengths = torch.zeros(batch, dtype=torch.long, device=key_states.device)
        self.groups = [
            HeadGroup(
                retention=retention,
                heads=heads,
                index=head_index(heads, key_states.device),
                keys=key_states.new_empty(batch, len(heads), 0, head_dim),
                values=value_states.new_empty(batch, len(heads), 0, value_states.shape[-1]),
                positions=torch.empty(batch, 0, dtype=torch.long, device=key_states.device),
            )
            for retention, heads in self.retentions
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Under autocast the rotary product leaves keys in fp32, while values have autocast's dtype.
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pending = PendingKV(self, key_states, value_states)
        return pending, pending

    def store(
        self, keys: Tensor, values: Tensor, plan: ForwardPlan, position_ids: Tensor | None
    ) -> list[tuple[HeadGroup, TokenPositions]]:
        assert self.lengths is not None
        positions = plan.new_tokens(position_ids, self.lengths)
        plain = plan.is_plain(position_ids)
        found = []
        for group in self.groups:
            group.append(keys, values, positions)
            group.first = group.first if plain else None
            found.append((group, group.token_positions(positions, self.num_tokens)))
        self.lengths = self.lengths + (positions >= 0).sum(-1)
        self.num_tokens += keys.shape[2]
        return found

    def release(self) -> None:
        assert self.lengths is not None
        # Until every row is past its dense rows, a query may still read all keys. No row has more tokens than slots, so
        # the device is asked only from there on, until the shortest row is past them.
        if not self.past_dense_rows:
            if self.num_tokens < self.num_dense_rows or int(self.lengths.min()) < self.num_dense_rows:
                return
            self.past_dense_rows = True
        for group in self.groups:
            group.evict(self.lengths)

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a SparseCache cannot be rolled back: evicted keys are gone; generate without an assistant")

    def reset(self) -> None:
        self.is_initialized, self.num_tokens, self.lengths, self.groups = False, 0, None, []
        self.past_dense_rows = not self.num_dense_rows

    def _apply(self, change: Any) -> None:
        if self.lengths is not None:
            self.lengths = change(self.lengths)
            for group in self.groups:
                group.apply(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def kv_bytes(self) -> int:
        """Bytes of the stored keys and values, from the tensors' storage."""
        tensors = [tensor for group in self.groups for tensor in (group.keys, group.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class SparseCache(Cache):
    """A KV cache whose heads hold what they can still read. `generate` makes one by itself on a sparsified model.

    Pass it as `past_key_values` to keep a conversation: `cache = SparseCache.for_model(model)`. Batches with padding,
    chunked prefill and beam search work; rolling back (assisted decoding) is refused.
    """

    def __init__(self, layouts: list[AttentionLayout], per_head: bool = True) -> None:
        self._sparse_layers = [SparseCacheLayer(layout, per_head) for layout in layouts]
        super().__init__(layers=list(self._sparse_layers))

    @classmethod
    def for_model(cls, model: Any) -> SparseCache:
        """An empty cache that fits a sparsified model.

        Raises:
            ValueError: if the model is not sparsified.
        """
        from sparse_hf.patching import get_handle

        handle = get_handle(model)
        return cls([state.layout for state in handle.states], per_head=handle.config.cache_policy == "per_head")

    def kv_bytes(self) -> int:
        """Bytes that keys and values hold now, over all layers; measured, not computed."""
        return sum(layer.kv_bytes() for layer in self._sparse_layers)
