from sparse_hf_kernels.sparse_attention.op import sparse_attention
from sparse_hf_kernels.sparse_attention.reference import sparse_attention_reference

__all__ = ["sparse_attention", "sparse_attention_reference"]
