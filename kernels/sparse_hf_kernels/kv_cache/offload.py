"""Linear heads in host memory: what a layer reads and writes comes to a device buffer, and new tokens go back.

`KVStorage` has all heads of a layer in one tensor, and kernels take one address. So rings, which stay on the device,
and linear heads, which do not, are put together in a buffer before a layer attends. Two buffers do for all layers of a
device: while one layer computes in the first, the next one's keys come to the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparse_hf_kernels.capture import is_capturing
from sparse_hf_kernels.kv_cache.layout import StorageLayout
from sparse_hf_kernels.kv_cache.side_stream import side_stream
from sparse_hf_kernels.kv_cache.storage import KVDtype, KVStorage, _no_scales, lasting

META = torch.device("meta")

ALIGNMENT = 256
"""Of the tensors in a buffer: kernels ask for multiples of 16."""


class Stage:
    """The two buffers of a device, and whose turn it is.

    Attributes:
        members: the storages that share them, by the layers' numbers, in whose order they are used. They hold the stage
            and are not held by it, so that memory is free as soon as a cache is dropped.
        latest: number of the buffer in which the current stream computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.side = side_stream(device)
        self.buffers: list[Tensor | None] = [None, None]
        self.members: WeakValueDictionary[int, OffloadedStorage] = WeakValueDictionary()
        self.latest = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Stage:
        # A copied cache computes in buffers of its own; its storages join as they are copied.
        return Stage(self.side.device)

    def bring(self, storage: OffloadedStorage) -> None:
        """Has a storage in a buffer for what the current stream does next."""
        if storage.buffer is None:
            self._fill(storage)
        assert storage.buffer is not None
        self.latest = storage.buffer
        self.side.join()

    def prefetch_after(self, storage: OffloadedStorage) -> None:
        """Has the storage that is used after this one come to the other buffer, beside what the current stream does."""
        following = self.members[min(self.members, key=lambda number: (number <= storage.number, number))]
        if following.buffer is None and following.filled:
            self._fill(following)

    @lasting
    def _fill(self, storage: OffloadedStorage) -> None:
        number = 1 - self.latest
        for other in self.members.values():
            if other.buffer == number:
                other.release()
        memory, size = self.buffers[number], storage.buffer_bytes()
        if memory is None or memory.numel() < size:
            # The smaller one is given back first.
            memory = self.buffers[number] = None
            for other in self.members.values():
                other.bound[number].clear()
            memory = torch.empty(size, dtype=torch.uint8, device=self.side.device)
            self.buffers[number] = self.side.share(memory)
        with self.side.after_current():
            storage.fill(memory, number)

    def allocated_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(0 if memory is None else memory.untyped_storage().nbytes() for memory in self.buffers)


class OffloadedStorage(KVStorage):
    """Keys and values whose linear heads lie in host memory, pinned where there is CUDA.

    `bring` before they are read or written, and `write_back` after new tokens were stored. Outside of buffers the
    tensors have shapes and no memory (the device "meta"), so that nobody reads another layer's keys.

    Args:
        stage: of the device.
        number: of the layer among those that share the stage.

    Attributes:
        rings: of each stored tensor, the slots of rings `[batch, ring_slots, ...]` on the device.
        host: of each stored tensor, `[batch, num_linear, capacity, ...]` in host memory.
        filled: slots of linear heads that may hold tokens.
        buffer: where the tensors are now, 0 or 1.
        bound: decode launches in either buffer.
    """

    is_offloaded: ClassVar[bool] = True

    @lasting
    def __init__(
        self,
        layout: StorageLayout,
        *,
        stage: Stage,
        number: int,
        batch: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        shape: dict[str, Any] = {"batch": batch, "head_dim": head_dim, "value_dim": value_dim, "capacity": capacity}
        super().__init__(layout, **shape, dtype=dtype, device=META, kv_dtype=kv_dtype)
        self.stage, self.number = stage, number
        self.state = torch.zeros(1 + batch, dtype=torch.int32, device=device)
        self.filled = 0
        self.buffer: int | None = None
        self.bound: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
        self.rings = [
            stage.side.share(torch.empty(batch, layout.ring_slots, *x.shape[2:], dtype=x.dtype, device=device))
            for x in self._stored()
        ]
        self.host = [self._host_room(x) for x in self._stored()]
        stage.members[number] = self

    def __getstate__(self) -> dict[str, Any]:
        self.stage.side.settle()
        self.release()
        return {**vars(self), "bound": ({}, {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._keep(self.rings, self.host)
        self.stage.members[self.number] = self

    def bring(self) -> None:
        if is_capturing():
            raise ValueError(
                "keys in host memory cannot be part of a captured CUDA graph, which would copy those of the capture "
                "again; make the cache without offload=True"
            )
        self.stage.bring(self)

    def prefetch_next(self) -> None:
        self.stage.prefetch_after(self)

    def fill(self, memory: Tensor, number: int) -> None:
        """Puts what is stored together in a buffer, as the current stream's work."""
        begin, found = 0, []
        for x in self._stored():
            found.append(memory[begin : begin + x.nbytes].view(x.dtype).view(x.shape))
            begin += _aligned(x.nbytes)
        if self.kv_dtype is None:
            found += [_no_scales(memory.device)] * 2
        self.keys, self.values, self.k_scales, self.v_scales = found
        self.buffer, self.launches = number, self.bound[number]
        for x, ring, host in zip(self._stored(), self.rings, self.host, strict=True):
            x[:, : ring.shape[1]].copy_(ring)
            for brought, kept in self._runs(x, host, [0] * self.batch, self.filled):
                self.stage.side.copy(brought, kept)

    def write_back(self, first: list[int], num_new: int) -> None:
        self.filled = max(self.filled, max(first) + num_new)
        with self.stage.side.after_current():
            for x, ring, host in zip(self._stored(), self.rings, self.host, strict=True):
                ring.copy_(x[:, : ring.shape[1]])
                for stored, kept in self._runs(x, host, first, num_new):
                    self.stage.side.copy(kept, stored)

    def release(self) -> None:
        """Lies in no buffer any more."""
        absent = [x.new_empty(self._shape(x), device=META) for x in self.rings]
        if self.kv_dtype is None:
            absent += [_no_scales(META)] * 2
        self.keys, self.values, self.k_scales, self.v_scales = absent
        self.buffer, self.launches = None, {}

    @lasting
    def apply(self, change: object) -> None:
        assert callable(change)
        self.stage.side.settle()
        self._change_state(change)
        self._keep([change(x) for x in self.rings], [change(x) for x in self.host])
        self.bound = ({}, {})
        self.release()

    @lasting
    def grow(self, capacity: int) -> None:
        if capacity <= self.capacity:
            return
        self.stage.side.settle()
        self.capacity, self.bound = capacity, ({}, {})
        self.release()
        for index, x in enumerate(self._stored()):
            old, room = self.host[index], self._host_room(x)
            room[:, :, : self.filled].copy_(old[:, :, : self.filled])
            self.host[index] = room

    def allocated_bytes(self) -> int:
        return self.host_bytes() + sum(x.untyped_storage().nbytes() for x in self.rings)

    def host_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.host)

    def buffer_bytes(self) -> int:
        """That a buffer needs."""
        return sum(_aligned(x.nbytes) for x in self._stored())

    def _stored(self) -> tuple[Tensor, ...]:
        """Those of `tensors()` that hold anything."""
        return self.tensors()[: 2 if self.kv_dtype is None else 4]

    def _shape(self, ring: Tensor) -> tuple[int, ...]:
        return (ring.shape[0], self.layout.row_slots(self.capacity), *ring.shape[2:])

    def _host_room(self, x: Tensor) -> Tensor:
        shape = x.shape[0], self.layout.num_linear, self.capacity, *x.shape[2:]
        return torch.empty(shape, dtype=x.dtype, pin_memory=self.state.is_cuda)

    def _keep(self, rings: list[Tensor], host: list[Tensor]) -> None:
        """Takes tensors that lie anywhere in the device's and in the host's memory."""
        self.rings = [self.stage.side.share(x) for x in rings]
        self.host = [x.pin_memory() for x in host] if self.state.is_cuda else host

    def _runs(self, x: Tensor, host: Tensor, first: list[int], count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` slots of each row and linear head, from the row's first one on, in x and in host memory. Each is one
        piece of memory on both sides: other copies would go through further ones."""
        linear = x[:, self.layout.ring_slots :].unflatten(1, (self.layout.num_linear, self.capacity))
        for row, begin in enumerate(first):
            for head in range(self.layout.num_linear):
                yield linear[row, head, begin : begin + count], host[row, head, begin : begin + count]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
