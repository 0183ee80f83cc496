"""Llama: grouped-query attention with rotary positions."""

from sparse_hf.adapters.base import Adapter


class LlamaAdapter(Adapter):
    model_type = "llama"
