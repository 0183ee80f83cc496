"""Sparse attention operators on torch and triton alone.

Every operator has a plain PyTorch reference that defines it, and a dispatch point (`dispatch.py`) where faster
backends plug in. Tensors follow transformers: `q [batch, num_heads, q_len, head_dim]`,
`k, v [batch, num_kv_heads, kv_len, head_dim]`.
"""

from sparse_hf_kernels.blocks import BlockList, BlockRule
from sparse_hf_kernels.capture import positions_as_data
from sparse_hf_kernels.dispatch import (
    AttentionRequest,
    Backend,
    Selection,
    available_backends,
    register_backend,
    select_backend,
    unregister_backend,
)
from sparse_hf_kernels.layout import UNBOUNDED, AttentionLayout, HeadPattern
from sparse_hf_kernels.mixed_attention import mixed_attention, mixed_attention_reference
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention import (
    TracedPositions,
    layout_key,
    sparse_attention,
    sparse_attention_reference,
)

__all__ = [
    "UNBOUNDED",
    "AttentionLayout",
    "AttentionRequest",
    "Backend",
    "BlockList",
    "BlockRule",
    "BlockSelection",
    "HeadPattern",
    "Selection",
    "TokenPositions",
    "TracedPositions",
    "available_backends",
    "layout_key",
    "mixed_attention",
    "mixed_attention_reference",
    "positions_as_data",
    "register_backend",
    "select_backend",
    "sparse_attention",
    "sparse_attention_reference",
    "unregister_backend",
]
