"""The single columns of a `BlockSelection`, on top of what a fused backend makes of its blocks.

Vertical-slash heads (MInference, arXiv 2407.02490) read some thousand scattered keys besides blocks: rounded to blocks
those would be nearly everything.
"""

from sparse_hf_kernels.sparse_attention.columns.autograd import attention_with_columns

__all__ = ["attention_with_columns"]
