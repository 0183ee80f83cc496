"""From layouts and positions to what a kernel walks: per tile, the blocks it visits and which of them need no mask."""

from sparse_hf_kernels.tiles.geometry import RowGeometry
from sparse_hf_kernels.tiles.table import TileShape, TileTable, backward_table, forward_table

__all__ = ["RowGeometry", "TileShape", "TileTable", "backward_table", "forward_table"]
