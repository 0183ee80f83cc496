"""Qwen3: as Qwen2 without biases, with RMS norms on q and k. The attention function receives them normalised."""

from sparse_hf.adapters.base import Adapter


class Qwen3Adapter(Adapter):
    model_type = "qwen3"
