"""Qwen2 and Qwen2.5: as Llama, with biases on q, k, v and sliding windows in some layers of some checkpoints."""

from sparse_hf.adapters.base import Adapter


class Qwen2Adapter(Adapter):
    model_type = "qwen2"
