"""Head masks that other projects learned, patterns as sparse tensors, and back."""

from sparse_hf.interop.duo_attention import export_duo_attention, import_duo_attention
from sparse_hf.interop.prulong import import_prulong
from sparse_hf.interop.sparse_tensors import to_bcsr, to_csr
from sparse_hf.interop.tsv import ImportedHeads

__all__ = [
    "ImportedHeads",
    "export_duo_attention",
    "import_duo_attention",
    "import_prulong",
    "to_bcsr",
    "to_csr",
]
