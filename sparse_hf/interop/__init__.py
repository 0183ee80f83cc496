"""Head masks that other projects learned, and back."""

from sparse_hf.interop.duo_attention import export_duo_attention, import_duo_attention
from sparse_hf.interop.prulong import import_prulong
from sparse_hf.interop.tsv import ImportedHeads

__all__ = ["ImportedHeads", "export_duo_attention", "import_duo_attention", "import_prulong"]
