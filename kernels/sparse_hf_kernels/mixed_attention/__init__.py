from sparse_hf_kernels.mixed_attention.op import mixed_attention
from sparse_hf_kernels.mixed_attention.reference import mixed_attention_reference

__all__ = ["mixed_attention", "mixed_attention_reference"]
