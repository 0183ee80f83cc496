"""sparse_hf: sparse attention for Hugging Face Transformers, per head.

    model = sparsify(AutoModelForCausalLM.from_pretrained(...), "user/llama-3.1-8b-sparse70")

Importing registers nothing and patches nothing.
"""

from sparse_hf.adapters import available_families
from sparse_hf.artefact import load_artefact, save_artefact
from sparse_hf.auto import AutoSparseModelForCausalLM
from sparse_hf.cache import SparseCache
from sparse_hf.capture import CaptureStats, capture
from sparse_hf.config import LayerRule, SparseConfig
from sparse_hf.functional import (
    flexprefill_prefill,
    full_prefill,
    load_prefill_config,
    minference_prefill,
    prefill,
    xattention_prefill,
)
from sparse_hf.head_masks import round_scores
from sparse_hf.hub import push_to_hub
from sparse_hf.methods import (
    BigBird,
    Dense,
    Dilated,
    Explicit,
    Fixed,
    FlexPrefill,
    HeadPlace,
    LocalGlobal,
    Method,
    MInference,
    MInferenceHead,
    SlidingWindow,
    Streaming,
    Strided,
    Triangle,
    TriShape,
    XAttention,
    available_methods,
)
from sparse_hf.patching import dense, is_sparsified, set_head_masks, unsparsify
from sparse_hf.presets import available_presets
from sparse_hf.sparsify import sparsify
from sparse_hf.summary import SparsitySummary, print_sparsity_summary, sparsity_summary

__version__ = "0.1.0"

__all__ = [
    "AutoSparseModelForCausalLM",
    "BigBird",
    "CaptureStats",
    "Dense",
    "Dilated",
    "Explicit",
    "Fixed",
    "FlexPrefill",
    "HeadPlace",
    "LayerRule",
    "LocalGlobal",
    "MInference",
    "MInferenceHead",
    "Method",
    "SlidingWindow",
    "SparseCache",
    "SparseConfig",
    "SparsitySummary",
    "Streaming",
    "Strided",
    "TriShape",
    "Triangle",
    "XAttention",
    "available_families",
    "available_methods",
    "available_presets",
    "capture",
    "dense",
    "flexprefill_prefill",
    "full_prefill",
    "is_sparsified",
    "load_artefact",
    "load_prefill_config",
    "minference_prefill",
    "prefill",
    "print_sparsity_summary",
    "push_to_hub",
    "round_scores",
    "save_artefact",
    "set_head_masks",
    "sparsify",
    "sparsity_summary",
    "unsparsify",
    "xattention_prefill",
]
