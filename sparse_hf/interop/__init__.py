"""What other projects learned or searched, patterns as sparse tensors, and the way back."""

from sparse_hf.interop.duo_attention import export_duo_attention, import_duo_attention
from sparse_hf.interop.minference import ImportedPatterns, export_minference, import_minference
from sparse_hf.interop.model_optimizer import export_model_optimizer
from sparse_hf.interop.native import export_native, native_config
from sparse_hf.interop.prulong import import_prulong
from sparse_hf.interop.sparse_tensors import to_bcsr, to_csr
from sparse_hf.interop.tsv import ImportedHeads
from sparse_hf.interop.xattention import export_xattention, import_xattention

__all__ = [
    "ImportedHeads",
    "ImportedPatterns",
    "export_duo_attention",
    "export_minference",
    "export_model_optimizer",
    "export_native",
    "export_xattention",
    "import_duo_attention",
    "import_minference",
    "import_prulong",
    "import_xattention",
    "native_config",
    "to_bcsr",
    "to_csr",
]
