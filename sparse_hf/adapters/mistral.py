"""Mistral: as Llama; early checkpoints have one sliding window for every layer."""

from sparse_hf.adapters.base import Adapter


class MistralAdapter(Adapter):
    model_type = "mistral"
