"""Methods: how one head picks the keys it reads. One file each; `registry.py` knows them by name."""

from sparse_hf.methods.base import Method
from sparse_hf.methods.dense import Dense
from sparse_hf.methods.explicit import Explicit
from sparse_hf.methods.registry import available_methods, method_class, method_from_dict
from sparse_hf.methods.sliding_window import SlidingWindow
from sparse_hf.methods.streaming import Streaming

__all__ = [
    "Dense",
    "Explicit",
    "Method",
    "SlidingWindow",
    "Streaming",
    "available_methods",
    "method_class",
    "method_from_dict",
]
