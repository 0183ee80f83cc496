from sparse_hf_kernels.sparse_attention.op import sparse_attention
from sparse_hf_kernels.sparse_attention.reference import sparse_attention_reference
from sparse_hf_kernels.sparse_attention.traced import TracedPositions, layout_key

__all__ = ["TracedPositions", "layout_key", "sparse_attention", "sparse_attention_reference"]
