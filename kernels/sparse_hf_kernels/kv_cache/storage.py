"""`KVStorage`: the keys and values of one layer in two tensors, whatever their heads keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from sparse_hf_kernels.kv_cache.layout import StorageGroup, StorageLayout

P = ParamSpec("P")
R = TypeVar("R")

KVDtype = Literal["int8", "fp8"]
QUANTIZED: dict[KVDtype, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}
"""Stored type and its largest value; one fp32 scale goes with each token of each head, for keys and for values."""


def lasting(make: Callable[P, R]) -> Callable[P, R]:
    """What `make` makes can be changed at any time. Tensors of `torch.inference_mode` cannot outside of it, and a
    prompt that is read there may be gone on with by `generate`, which has no gradients but is not in that mode."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return make(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return made


@lru_cache
def _no_scales(device: torch.device) -> Tensor:
    """What kernels are given in place of scales, and never look at."""
    with torch.inference_mode(False):
        return torch.empty(0, 0, dtype=torch.float32, device=device)


SCARCE = 8
"""Memory is scarce once less than one part of so many is free."""


def _give_back_blocks(device: torch.device) -> None:
    """Where memory is scarce, hands torch's unused blocks back to the GPU.

    Every growth leaves blocks that are too small for the next one, of as many sizes as layers have numbers of linear
    heads. torch cuts smaller tensors from the larger blocks, and what is left of those serves nobody: a cache of 70%
    streaming heads held a fifth less that way.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < total // SCARCE:
        torch.cuda.empty_cache()


class KVStorage:
    """Keys and values `[batch, row_slots, head_dim]` of a layer's KV heads.

    Args:
        layout: how each head keeps its tokens.
        batch: rows.
        head_dim, value_dim: of keys and of values.
        dtype: of the keys and values that come and go.
        device: of the tensors.
        capacity: tokens that linear heads have room for.
        kv_dtype: how they are stored; None as they come.

    Attributes:
        state: int32 `[1 + batch]`: slots that queries came in, padding included, then the tokens of each row. On the
            device, so that captured graphs go on counting.
        launches: of decode steps, bound to where the tensors lie; to be cleared when they move.
    """

    is_offloaded: ClassVar[bool] = False
    """The tensors have to be brought to the device and written back; see `OffloadedStorage`."""

    @lasting
    def __init__(
        self,
        layout: StorageLayout,
        *,
        batch: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        stored = dtype if kv_dtype is None else QUANTIZED[kv_dtype][0]
        slots = layout.row_slots(capacity)
        keys = torch.empty(batch, slots, head_dim, dtype=stored, device=device)
        values = torch.empty(batch, slots, value_dim, dtype=stored, device=device)
        state = torch.zeros(1 + batch, dtype=torch.int32, device=device)
        self._hold(layout, capacity, keys, values, state, dtype, kv_dtype)
        if kv_dtype is not None:
            self.k_scales, self.v_scales = (
                torch.empty(batch, slots, dtype=torch.float32, device=device) for _ in range(2)
            )

    @classmethod
    @lasting
    def of_first(cls, layout: StorageLayout, k: Tensor, v: Tensor, state: Tensor, capacity: int) -> KVStorage:
        """A storage that holds tokens 0 on, made in as few operations as a stock cache takes.

        Args:
            layout: of linear heads alone.
            k, v: `[batch, num_kv_heads, new, head_dim]`; copied in any case, so that nobody else holds what is stored.
            state: with these tokens counted, see `counted_states`. Kept, not copied.
            capacity: tokens that there is room for, `new` or more.
        """
        batch, num_heads, num_new, head_dim = k.shape
        k_shape, v_shape = (batch, num_heads * capacity, head_dim), (batch, num_heads * capacity, v.shape[3])
        storage = cls.__new__(cls)
        if num_new == capacity:
            keys = k.clone(memory_format=torch.contiguous_format).view(k_shape)
            values = v.clone(memory_format=torch.contiguous_format).view(v_shape)
            storage._hold(layout, capacity, keys, values, state, v.dtype, None)
        else:
            storage._hold(layout, capacity, k.new_empty(k_shape), v.new_empty(v_shape), state, v.dtype, None)
            storage._copy_run(k, v, 0)
        return storage

    def _hold(
        self,
        layout: StorageLayout,
        capacity: int,
        keys: Tensor,
        values: Tensor,
        state: Tensor,
        dtype: torch.dtype,
        kv_dtype: KVDtype | None,
    ) -> None:
        """Becomes the storage in these tensors; scales, where there are any, are not yet among them."""
        self.layout, self.capacity, self.dtype, self.kv_dtype = layout, capacity, dtype, kv_dtype
        self.keys, self.values, self.state = keys, values, state
        self.k_scales = self.v_scales = _no_scales(values.device)
        self.launches: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors lie elsewhere.
        return {**vars(self), "launches": {}}

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row: int32 `[batch]`."""
        return self.state[1:]

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values and their scales; dimension 0 is the batch, 1 the slots."""
        return self.keys, self.values, self.k_scales, self.v_scales

    @lasting
    def apply(self, change: object) -> None:
        """Replaces every tensor by `change(tensor)`, which takes rows of the batch; the state's first entry stays."""
        assert callable(change)
        self._change_state(change)
        self.launches.clear()
        quantized = self.kv_dtype is not None
        self.keys, self.values = change(self.keys), change(self.values)
        if quantized:
            self.k_scales, self.v_scales = change(self.k_scales), change(self.v_scales)

    def _change_state(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = torch.cat([self.state[:1], change(self.lengths)])

    @lasting
    def grow(self, capacity: int) -> None:
        """Gives linear heads room for `capacity` tokens; what is stored is copied, one tensor at a time."""
        if capacity <= self.capacity:
            return
        old, rings, linear = self.capacity, self.layout.ring_slots, self.layout.num_linear

        def grown(x: Tensor) -> Tensor:
            if not len(x):
                return x
            new = x.new_empty(x.shape[0], self.layout.row_slots(capacity), *x.shape[2:])
            new[:, :rings].copy_(x[:, :rings])
            tail = (linear, -1)
            new[:, rings:].unflatten(1, tail)[:, :, :old].copy_(x[:, rings:].unflatten(1, tail))
            return new

        self.launches.clear()
        if linear:
            _give_back_blocks(self.keys.device)
            self.keys, self.values = grown(self.keys), grown(self.values)
            self.k_scales, self.v_scales = grown(self.k_scales), grown(self.v_scales)
        self.capacity = capacity

    def bring(self) -> None:
        """Has the tensors on the device until another storage is brought. Here they always are."""

    def prefetch_next(self) -> None:
        """Has what the next layer needs come while this one computes. Here nothing has to."""

    def write_back(self, first: list[int], num_new: int) -> None:
        """Keeps new tokens beyond the time in which the tensors are on the device. Here nothing has to be done.

        Args:
            first: the slot of each row's first new token in linear heads.
            num_new: slots from there on that are kept, at least those of the new tokens.
        """

    def view(self, x: Tensor, group: StorageGroup) -> Tensor:
        """One of `tensors()` as the group's `[batch, heads, slots, ...]`."""
        slots = group.slots(self.capacity)
        part = x[:, group.first_slot : group.first_slot + len(group.heads) * slots]
        return part.unflatten(1, (len(group.heads), slots))

    def write_run(self, k: Tensor, v: Tensor, seen: int) -> bool:
        """Stores tokens `[batch, num_kv_heads, new, head_dim]` from slot `seen` on by a plain copy; False where heads
        do not all keep them as they come."""
        if self.kv_dtype is not None or not self.layout.is_linear:
            return False
        self._copy_run(k, v, seen)
        return True

    def _copy_run(self, k: Tensor, v: Tensor, seen: int) -> None:
        for x, new in ((self.keys, k), (self.values, v)):
            x.view(*new.shape[:2], self.capacity, new.shape[3]).narrow(2, seen, new.shape[2]).copy_(new)

    def read(self, group: StorageGroup, *spans: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        """The group's keys and values `[batch, heads, span, head_dim]` in these spans of slots, as they came.

        Views, unless what is stored is quantized.
        """
        keys, values, k_scales, v_scales = self.tensors()
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for into, x, scales in zip(found, (keys, values), (k_scales, v_scales), strict=True):
            whole = self.view(x, group)
            for begin, end in spans:
                part = whole[:, :, begin:end]
                if self.kv_dtype is not None:
                    part = (part.float() * self.view(scales, group)[:, :, begin:end, None]).to(self.dtype)
                into.append(part)
        return found

    def allocated_bytes(self) -> int:
        """Bytes of the tensors' storage, spare room included."""
        return sum(x.untyped_storage().nbytes() for x in self.tensors())

    def host_bytes(self) -> int:
        """Those of `allocated_bytes()` that are taken in host memory beside the device."""
        return 0

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes of the slots that are filled once a row has `num_tokens` tokens."""
        per_slot = sum(x[0, 0].numel() * x.element_size() for x in self.tensors() if x.numel())
        filled = sum(len(group.heads) * min(num_tokens, group.slots(num_tokens)) for group in self.layout.groups)
        return self.batch * filled * per_slot


@lasting
def counted_states(num_storages: int, batch: int, num_tokens: int, device: torch.device) -> list[Tensor]:
    """`KVStorage.state` of storages in which every row has so many tokens, by one launch for all of them."""
    # Kernels are compiled for states at multiples of 16 bytes, where tensors of their own would lie.
    width = -(-(1 + batch) // 4) * 4
    states = torch.full((num_storages, width), num_tokens, dtype=torch.int32, device=device)
    return list(states[:, : 1 + batch].unbind())


def quantize(x: Tensor, kv_dtype: KVDtype) -> tuple[Tensor, Tensor]:
    """x `[..., head_dim]` as stored, and its scales `[...]`."""
    stored, largest = QUANTIZED[kv_dtype]
    x = x.float()
    scales = x.abs().amax(-1) / largest
    # A token of zeros keeps scale 0 and reads as zeros.
    scaled = x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return (scaled.round() if stored == torch.int8 else scaled).clamp(-largest, largest).to(stored), scales
