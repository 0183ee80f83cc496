from sparse_hf_kernels.scoring.xattention.op import xattention_block_mass

__all__ = ["xattention_block_mass"]
