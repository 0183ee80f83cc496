"""What launching the Gluon kernels has in common: TMA descriptors, and where rows and keys stand."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.tiles import RowGeometry, TileTable

LOG2E = 1.4426950408889634
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LARGEST_DISTANCE = 2**30


@lru_cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.float32 if dtype == torch.float32 else GLUON_DTYPES[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)


def descriptor(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """TMA descriptor of tiles `[1, 1, rows, columns]` of x `[batch, heads, length, head_dim]`, whatever its strides."""
    columns = columns or x.shape[-1]
    # A dimension of one element may carry any stride; TMA checks it all the same.
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(
        x, list(x.shape), [*strides, 1], [1, 1, rows, columns], _shared_layout(rows, columns, x.dtype)
    )


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tma_ready(x: Tensor) -> Tensor:
    """x if TMA can read it as it lies (16-byte strides, last dimension dense), else a copy."""
    unit = 16 // x.element_size()
    batch, heads, row, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0:
        if not (batch % unit or heads % unit or row % unit):
            return x
        # A dimension of size 1 may carry any stride, which the descriptor would still check.
        if not any(n > 1 and s % unit for s, n in zip((batch, heads, row), x.shape[:3], strict=True)):
            return x
    # Not `contiguous`, which returns a dense tensor at an odd address as it is.
    return x.clone(memory_format=torch.contiguous_format)


def geometry_args(geometry: RowGeometry, layout: AttentionLayout, table: TileTable) -> dict[str, Tensor | int | bool]:
    """Kernel arguments that say where rows and keys stand."""

    def pointer(x: Tensor | None) -> Tensor:
        return table.lists if x is None else x  # a pointer that goes unread

    own_keys = geometry.offset + geometry.q_len <= geometry.kv_len
    simple = geometry.is_closed_form and layout.causal and own_keys and layout.num_dense_rows == 0
    simple = simple and not table.has_last_rows
    return dict(
        q_len=geometry.q_len,
        kv_len=geometry.kv_len,
        offset=geometry.offset,
        start=geometry.start,
        q_start=pointer(geometry.q_start),
        q_pos=pointer(geometry.q_pos),
        q_end=pointer(geometry.q_end),
        k_pos=pointer(geometry.k_pos),
        max_distance=min(layout.max_distance, LARGEST_DISTANCE),
        num_dense_rows=layout.num_dense_rows,
        num_last=layout.num_last_tokens,
        SIMPLE=simple,
        CLOSED=geometry.is_closed_form,
        CAUSAL=layout.causal,
        HAS_K_POS=geometry.k_pos is not None,
        LAST=table.has_last_rows,
        ROW_BATCHES=geometry.batch > 1,
    )
