"""Scores that choose what to attend to, and the compact lists made of them; see each operator for its source.

Every operator is `naive` (plain torch, fp32, any device: the definition) and `triton` (CUDA). All take strided q and k
as transformers gives them, grouped heads unrepeated, any length, and nothing here waits for the device.
"""

from sparse_hf_kernels.scoring.columns import gather_columns, scatter_add_columns
from sparse_hf_kernels.scoring.last_q import last_q_sums
from sparse_hf_kernels.scoring.pooled import mean_pool, pooled_block_scores
from sparse_hf_kernels.scoring.selection import select_top_k, select_top_p, transpose_lists
from sparse_hf_kernels.scoring.xattention import xattention_block_mass

__all__ = [
    "gather_columns",
    "last_q_sums",
    "mean_pool",
    "pooled_block_scores",
    "scatter_add_columns",
    "select_top_k",
    "select_top_p",
    "transpose_lists",
    "xattention_block_mass",
]
