"""One layer of a `SparseCache`: what is stored, when room is made, and when heads part.

All heads of a layer lie in one storage (`sparse_hf_kernels.kv_cache`): full heads in slots that grow in steps, sparse
heads in rings. Only real tokens are stored, so that the number of a row's tokens says what each slot holds; padding
needs no further bookkeeping.

transformers' attention modules call `update` and pass what it returns to the attention function. The layers here return
a `PendingKV`: the new keys, not yet stored, since only the attention function learns their positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparse_hf.cached_groups import CachedGroup, linear_group, ring_group
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.retention import cache_plan
from sparse_hf_kernels import AttentionLayout
from sparse_hf_kernels.capture import is_capturing
from sparse_hf_kernels.kv_cache import (
    KVDtype,
    KVStorage,
    OffloadedStorage,
    Stage,
    StorageGroup,
    StorageLayout,
    counted_states,
    kernels_refuse,
    slot_positions,
    store_tokens,
)

logger = logging.getLogger(__name__)

GROWTH = 128
"""A full head that has no room for new tokens is copied to where it has room for 1/GROWTH more than it needs: little
memory is spare, and a copy of all is shared by as many tokens as there was room for."""

MIN_GROWTH = 64

LAYERS_AT_ONCE = 32
"""Layers whose counts of tokens are made together."""


def spare_tokens(num_tokens: int) -> int:
    """Tokens that full heads of `num_tokens` get room for besides."""
    return max(MIN_GROWTH, num_tokens // GROWTH)


@lru_cache(maxsize=1)
def _decode_fused() -> Callable[..., tuple[Tensor, Any]]:
    """Imported when it is first called, since it needs Triton."""
    from sparse_hf_kernels.kv_cache.launch import decode_fused

    return decode_fused


@lru_cache
def _say_refusal(reason: str) -> None:
    """Once per reason."""
    logger.warning(f"decoding takes one launch per kind of head instead of one per layer: the fused kernels {reason}")


def _counted(plan: ForwardPlan, batch: int) -> Tensor:
    """The state of a storage that holds the tokens of this forward pass; made for many layers at once."""
    left: list[Tensor] = plan.known.setdefault("counted_states", [])
    if not left:
        left += counted_states(LAYERS_AT_ONCE, batch, plan.q_len, plan.device)
    return left.pop()


class PendingKV:
    """New keys and values on their way from a cache layer to the sparse attention function."""

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: SparseCacheLayer, keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a SparseCache was given to an attention that is not sparse (it asked for {name!r}); "
            "use DynamicCache inside `with dense(model)` or after `unsparsify`"
        )


class SparseCacheLayer(CacheLayerMixin):
    """One layer's keys and values.

    Args:
        layout: what its heads read.
        per_head: sparse heads free what they cannot read any more.
        max_length: tokens that the layer has room for from the start, and no more; None lets it grow.
        kv_dtype: how keys and values are stored; None as they come.
        scratch: of decode launches by device, shared by the layers of a cache.
        stages: by device, shared too: full heads lie in host memory. None leaves them on the device.
        number: of the layer in the cache.
    """

    is_sliding = False
    # `generate` would compile the whole forward on a GPU, and `update` breaks that graph in every layer.
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    # What an empty layer has. Of the class: a cache is made for each prompt, and has as many layers as the model.
    keys = values = None  # as transformers' layers do; ours are in the storage
    is_initialized = False
    storage: KVStorage | None = None
    expected_tokens = 0
    _num_tokens = 0
    _is_plain: bool | None = True
    """Every slot that came holds a token; None after steps whose padding nobody looked at."""
    _served: tuple[KVStorage | None, str | None, bool] = (None, None, False)

    def __init__(
        self,
        layout: AttentionLayout,
        per_head: bool = True,
        max_length: int | None = None,
        kv_dtype: KVDtype | None = None,
        scratch: dict[torch.device, Any] | None = None,
        stages: dict[torch.device, Stage] | None = None,
        number: int = 0,
    ) -> None:
        self.layout, self.plan = layout, cache_plan(layout, per_head)
        self.max_length, self.kv_dtype = max_length, kv_dtype
        self._scratch: dict[torch.device, Any] = {} if scratch is None else scratch
        self._stages, self._number = stages, number

    @property
    def num_tokens(self) -> int:
        """Slots that queries came in, padding included.

        Raises:
            ValueError: while a CUDA graph is captured, for a cache of a fixed length, whose count is on the device.
        """
        if self.max_length is None or self.storage is None or self.storage.is_offloaded:
            return self._num_tokens
        if is_capturing():
            raise ValueError("chunks of several tokens cannot be captured in a CUDA graph with a SparseCache; "
                             "capture decode steps of one token")  # fmt: skip
        return int(self.storage.state[0])

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row: int32 `[batch]`."""
        return None if self.storage is None else self.storage.lengths

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the storage for these first tokens."""
        batch, _, num_new, head_dim = key_states.shape
        # While a sequence is shorter than its rings they would take more than they hold; but where the length is fixed,
        # only dense rows make heads part later.
        short = self.max_length is None and num_new < self.plan.parts_at
        first = self.plan.first if short or self.layout.num_dense_rows else None
        self.storage = self._new_storage(
            first or self.plan.storage,
            batch=batch,
            head_dim=head_dim,
            value_dim=value_states.shape[-1],
            dtype=value_states.dtype,
            device=key_states.device,
            capacity=self.max_length or max(self._expected(first is not None), num_new),
            kv_dtype=self.kv_dtype,
        )
        self.is_initialized = True

    def _new_storage(self, layout: StorageLayout, *, device: torch.device, **options: Any) -> KVStorage:
        if self._stages is None or not layout.num_linear:
            return KVStorage(layout, device=device, **options)
        stage = self._stages.setdefault(device, Stage(device))
        return OffloadedStorage(layout, stage=stage, number=self._number, device=device, **options)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Under autocast the rotary product leaves keys in fp32, while values have autocast's dtype. Later tokens are
        # stored in that of the first ones, should autocast or the model's own dtype be another one by then.
        dtype = value_states.dtype if self.storage is None else self.storage.dtype
        if key_states.dtype != dtype or value_states.dtype != dtype:
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        # The first tokens of a growing cache wait for `store`, which makes room and fills it in one go; a single one is
        # for the decode step, which asks for a storage.
        if self.storage is None and (self.max_length is not None or key_states.shape[2] == 1):
            self.lazy_initialization(key_states, value_states)
        pending = PendingKV(self, key_states, value_states)
        return pending, pending

    def fits(self, layout: AttentionLayout) -> bool:
        """Whether the layer was made for this layout. A copied cache takes over the model's own object, so that later
        calls need not compare."""
        if layout is not self.layout and layout == self.layout:
            self.layout = layout
        return layout is self.layout

    def check_step(self, plan: ForwardPlan) -> None:
        """Raises ValueError if the layer holds other tokens than the first one did when the forward pass began.

        Of a fixed length the host's own count tells: to read the device's would be to wait for it.
        """
        seen = self._num_tokens
        first = plan.q_offset if self.max_length is None else plan.known.setdefault("seen", seen)
        if seen != first:
            raise ValueError(
                f"the layers of this SparseCache hold different numbers of tokens, {seen} and {first}: an exception "
                "ended a forward pass in its middle; make a new cache, or go on from a copy made before"
            )

    def decodes(self, query: Tensor, plan: ForwardPlan) -> bool:
        """Whether `decode` serves this query, one new token of each row."""
        storage = self.storage
        assert storage is not None
        if not self.plan.decodes or query.dtype != storage.dtype:
            return False
        forced = plan.forced_backend()
        if self._served[:2] != (storage, forced):
            refusal = kernels_refuse(storage, query.device)
            if refusal is not None and query.device.type == "cuda":
                _say_refusal(refusal)
            self._served = storage, forced, refusal is None
        return self._served[2]

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, plan: ForwardPlan, scale: float) -> Tensor:
        """Attends one new token of each row and stores it; waits for nothing.

        Args:
            query: `[batch, num_heads, 1, head_dim]`.
            keys, values: `[batch, num_kv_heads, 1, head_dim]`.

        Returns:
            `[batch, 1, num_heads, head_dim]`.
        """
        storage = self.storage
        assert storage is not None
        valid = plan.newest_valid(keys.shape[0])
        if self.max_length is None or storage.is_offloaded:
            self._make_room(self._num_tokens + 1)
        first = self._bring(plan, valid is None and self._is_plain is True) if storage.is_offloaded else None
        work = self._scratch.get(query.device)
        out, self._scratch[query.device] = _decode_fused()(query, keys, values, storage, work, scale, valid)
        if first is not None:
            storage.write_back(first, 1)
        self._num_tokens += 1
        if valid is not None:
            self._is_plain = None
        # Of a fixed length nothing moves: what sparse heads may drop is left where it is.
        if storage.layout is self.plan.first and self.max_length is None:
            self._part(plan, self._num_tokens)
        return out

    def store_at_once(self, keys: Tensor, values: Tensor, plan: ForwardPlan) -> bool:
        """Stores the first tokens of a forward pass without padding and packing by one copy each, as a stock cache
        does; False, with nothing done, where they are stored otherwise or heads part with them."""
        cache, (batch, _, num_new, _) = self.plan, keys.shape
        if self.max_length is not None or self.kv_dtype is not None or self._stages is not None:
            return False
        if cache.first is not None and num_new >= cache.parts_at:
            return False
        capacity = max(self._expected(cache.first is not None), num_new) if self.expected_tokens else num_new
        self.storage = KVStorage.of_first(cache.first or cache.storage, keys, values, _counted(plan, batch), capacity)
        self.is_initialized, self._num_tokens = True, num_new
        return True

    def store(self, keys: Tensor, values: Tensor, plan: ForwardPlan, position_ids: Tensor | None) -> None:
        """Stores the new tokens of all KV heads, `[batch, num_kv_heads, new, head_dim]`.

        Raises:
            ValueError: for packed sequences, or if a cache of a fixed length has no room for them.
        """
        if self.storage is None:
            if self._look(plan, position_ids) and self.store_at_once(keys, values, plan):
                return
            self.lazy_initialization(keys, values)
        storage, seen, plain = self.storage, self.num_tokens, self._look(plan, position_ids)
        assert storage is not None
        positions = None if plain else self._new_positions(plan, position_ids)
        self._make_room(seen + keys.shape[2])
        first = self._bring(plan, plain) if storage.is_offloaded else None
        told = {"seen": seen} if positions is None else {"positions": positions}
        store_tokens(storage, keys, values, **told)
        if first is not None:
            storage.write_back(first, keys.shape[2])
        self._num_tokens = seen + keys.shape[2]
        if storage.layout is self.plan.first:
            self._part(plan, self._num_tokens)

    def extend(
        self, keys: Tensor, values: Tensor, plan: ForwardPlan, position_ids: Tensor | None, by_position: bool = False
    ) -> list[CachedGroup]:
        """Stores the new tokens and returns what they attend to, group by group.

        Args:
            by_position: positions are true ones. Otherwise those of heads with sinks may leave out the gap behind the
                sinks, so that they have a closed form.
        """
        if self.storage is None:
            self.lazy_initialization(keys, values)
        assert self.storage is not None
        seen, storage = self.num_tokens, self.storage
        plain = self._look(plan, position_ids)
        new = None if plain else self._new_positions(plan, position_ids)
        whole = storage.layout is self.plan.first
        storage.bring()
        rings: dict[StorageGroup, CachedGroup] = {}
        for group, layout in zip(storage.layout.groups, self._parts(), strict=True):
            if group.ring is not None:
                rings[group] = ring_group(storage, group, layout, keys, values, seen, new, by_position)
        self.store(keys, values, plan, position_ids)
        found = []
        for group, layout in zip(storage.layout.groups, self._parts(whole), strict=True):
            if group in rings:
                found.append(rings[group])
            else:
                found.append(linear_group(storage, group, layout, seen, seen + keys.shape[2], new))
        return found

    def _parts(self, whole: bool | None = None) -> tuple[AttentionLayout, ...]:
        """The layouts of the storage's groups; a layer that keeps all keys for now is one group."""
        assert self.storage is not None
        is_whole = self.storage.layout is self.plan.first if whole is None else whole
        return (self.layout,) if is_whole else self.plan.parts

    def _look(self, plan: ForwardPlan, position_ids: Tensor | None) -> bool:
        """Whether all slots so far and the new ones hold tokens of one sequence a row."""
        if "cache_is_plain" not in plan.known:
            past = self._is_plain
            if plan.padding_mask is not None:
                past = True  # the mask tells of all tokens
            elif past is None:
                assert self.storage is not None
                past = bool((self.storage.lengths == self.storage.state[0]).all())
            plan.known["cache_is_plain"] = plan.is_plain(position_ids) and past
        self._is_plain = plan.known["cache_is_plain"]
        return plan.known["cache_is_plain"]

    def _new_positions(self, plan: ForwardPlan, position_ids: Tensor | None) -> Tensor:
        """Positions `[batch, new]` of the new tokens, -1 for padding: the same in all layers."""
        assert self.storage is not None
        if "new_positions" not in plan.known:
            plan.known["new_positions"] = plan.new_tokens(position_ids, self.storage.lengths.to(torch.int64))
        return plan.known["new_positions"]

    def _bring(self, plan: ForwardPlan, plain: bool) -> list[int]:
        """Has an offloaded storage on the device, and the next layer's follow.

        Returns:
            For each row, the slot of its first new token: what the host knows of a plain batch, and the device of
            others, where it is asked once for all layers.
        """
        storage = self.storage
        assert storage is not None
        if not plain and "lengths" not in plan.known:
            plan.known["lengths"] = storage.lengths.tolist()
        storage.bring()
        storage.prefetch_next()
        return [self._num_tokens] * storage.batch if plain else plan.known["lengths"]

    def _make_room(self, num_tokens: int) -> None:
        storage = self.storage
        assert storage is not None
        if num_tokens <= storage.capacity:
            return
        if self.max_length is not None:
            raise ValueError(
                f"the cache was made for {self.max_length} tokens and would hold {num_tokens}; "
                "give SparseCache.for_model a larger max_length, or none so that it grows"
            )
        spare = spare_tokens(num_tokens) if storage.capacity else 0
        storage.grow(max(num_tokens + spare, self._expected(storage.layout is self.plan.first)))

    def _expected(self, whole: bool) -> int:
        """Tokens to make room for at once. While all heads keep every key for now, no more than that lasts."""
        return min(self.expected_tokens, self.plan.parts_at) if whole else self.expected_tokens

    def _part(self, plan: ForwardPlan, num_tokens: int) -> None:
        """Gives heads their own storage once some may free keys."""
        storage, num_dense = self.storage, self.layout.num_dense_rows
        assert storage is not None
        # No row has more tokens than slots, so the device is asked only from there on; layers share the answer.
        if num_tokens < self.plan.parts_at:
            return
        if num_dense and "fewest_tokens" not in plan.known:
            plan.known["fewest_tokens"] = num_tokens if self._is_plain else int(storage.lengths.min())
        if num_dense and plan.known["fewest_tokens"] < num_dense:
            return  # a dense row, which reads every key, may still come
        (group,) = storage.layout.groups
        (keys,), (values,) = storage.read(group, (0, num_tokens))
        parted = self._new_storage(
            self.plan.storage,
            batch=storage.batch,
            head_dim=keys.shape[-1],
            value_dim=values.shape[-1],
            dtype=storage.dtype,
            device=keys.device,
            capacity=self.max_length or max(self.expected_tokens, storage.capacity),
            kv_dtype=storage.kv_dtype,
        )
        # To the other buffer: this call may still read the storage so far.
        parted.bring()
        store_tokens(parted, keys, values, positions=slot_positions(None, num_tokens, storage.lengths))
        parted.state.copy_(storage.state)
        parted.write_back([0] * parted.batch, num_tokens)
        self.storage, self._served = parted, (None, None, False)

    def get_seq_length(self) -> Any:
        if self.max_length is None or self.storage is None:
            return self._num_tokens
        return self.storage.state[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_length is None or self.storage is None:
            return self._num_tokens + query_length, 0
        return self.max_length, 0

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a SparseCache cannot be rolled back: evicted keys are gone; generate without an assistant")

    def reset(self) -> None:
        for name in ("is_initialized", "storage", "_num_tokens", "_is_plain", "_served"):
            vars(self).pop(name, None)

    def _apply(self, change: Any) -> None:
        if self.storage is not None:
            self.storage.apply(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def kv_bytes(self) -> int:
        """Bytes of the slots that hold keys and values."""
        return 0 if self.storage is None else self.storage.held_bytes(self.num_tokens)

    def allocated_bytes(self) -> int:
        """Bytes of the tensors' storage: what is held, and the room that full heads have for more."""
        return 0 if self.storage is None else self.storage.allocated_bytes()

    def host_bytes(self) -> int:
        """Those of `allocated_bytes()` that lie in host memory beside the device."""
        return 0 if self.storage is None else self.storage.host_bytes()
