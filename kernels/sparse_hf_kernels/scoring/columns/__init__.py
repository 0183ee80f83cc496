from sparse_hf_kernels.scoring.columns.op import gather_columns, scatter_add_columns

__all__ = ["gather_columns", "scatter_add_columns"]
