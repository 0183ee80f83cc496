"""Model families: what `sparsify` must know of an architecture. One file each; `registry.py` knows them by name."""

from sparse_hf.adapters.base import Adapter, ModelShape
from sparse_hf.adapters.registry import adapter_for, adapter_for_config, available_families

__all__ = ["Adapter", "ModelShape", "adapter_for", "adapter_for_config", "available_families"]
