from sparse_hf_kernels.scoring.selection.op import select_top_k, select_top_p, transpose_lists

__all__ = ["select_top_k", "select_top_p", "transpose_lists"]
