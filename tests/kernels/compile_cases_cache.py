"""The kernels of the KV cache as arguments to compile, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sparse_hf_kernels.kv_cache import HeadStorage, KVStorage, StorageLayout
from sparse_hf_kernels.kv_cache.decode_kernel import _decode_kernel
from sparse_hf_kernels.kv_cache.launch import Workspace, decode_arguments, decode_options, store_arguments
from sparse_hf_kernels.kv_cache.store_kernel import _store_kernel

META = torch.device("meta")
Case = tuple[Any, tuple[Any, ...], dict[str, Any], str]


def cases(arch: int, head_dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Decoding and storing, with every kind of storage; groups of one, four and eight query heads."""
    layout = StorageLayout(heads=(HeadStorage(), HeadStorage(recent=1023, num_sink_tokens=64)))
    for dim in head_dims:
        for dtype in dtypes:
            for kv_dtype in (None, "int8", "fp8"):
                if kv_dtype == "fp8" and arch < 89:
                    continue
                storage = KVStorage(
                    layout,
                    batch=4,
                    head_dim=dim,
                    value_dim=dim,
                    dtype=dtype,
                    device=META,
                    capacity=4096,
                    kv_dtype=kv_dtype,
                )
                label = f"sm_{arch} hd{dim} {str(dtype)[6:]} {kv_dtype or 'plain'}"
                yield from _stored(storage, dim, dtype, label)
                for group in (1, 4, 8) if kv_dtype is None else (4,):
                    yield _decoded(storage, dim, dtype, group, f"{label} group of {group}")


def _new(heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(4, length, heads, dim, dtype=dtype, device=META).transpose(1, 2)


def _stored(storage: KVStorage, dim: int, dtype: torch.dtype, label: str) -> Iterator[Case]:
    new = _new(2, 100, dim, dtype)
    for positions in (None, torch.empty(4, 100, dtype=torch.int64, device=META)):
        lengths = None if positions is None else storage.lengths
        _, arguments, options = store_arguments(new, new, storage, positions, lengths, 0)
        yield _store_kernel, arguments, options, f"{label} {'run' if positions is None else 'positions'}"


def _decoded(storage: KVStorage, dim: int, dtype: torch.dtype, group: int, label: str) -> Case:
    q, new = _new(2 * group, 1, dim, dtype), _new(2, 1, dim, dtype)
    valid = torch.empty(4, dtype=torch.bool, device=META)
    work = Workspace(META, 8, group, dim, 3)
    arguments = decode_arguments(q, new, new, q, storage, work, 1.0, valid)
    return _decode_kernel, arguments, decode_options(2 * group, 2, dim, 4, dtype, storage, True), label
