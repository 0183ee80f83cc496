from sparse_hf_kernels.scoring.pooled.op import mean_pool, pooled_block_scores

__all__ = ["mean_pool", "pooled_block_scores"]
