"""Methods: how one head picks the keys it reads. One file each; `registry.py` knows them by name."""

from sparse_hf.methods.base import HeadPlace, Method
from sparse_hf.methods.bigbird import BigBird
from sparse_hf.methods.dense import Dense
from sparse_hf.methods.dilated import Dilated
from sparse_hf.methods.dynamic import DynamicMethod
from sparse_hf.methods.explicit import Explicit
from sparse_hf.methods.fixed import Fixed
from sparse_hf.methods.flexprefill import FlexPrefill
from sparse_hf.methods.local_global import LocalGlobal
from sparse_hf.methods.minference import MInference, MInferenceHead
from sparse_hf.methods.registry import available_methods, method_class, method_from_dict
from sparse_hf.methods.sliding_window import SlidingWindow
from sparse_hf.methods.streaming import Streaming
from sparse_hf.methods.strided import Strided
from sparse_hf.methods.tri_shape import TriShape
from sparse_hf.methods.triangle import Triangle
from sparse_hf.methods.xattention import XAttention

__all__ = [
    "BigBird",
    "Dense",
    "Dilated",
    "DynamicMethod",
    "Explicit",
    "Fixed",
    "FlexPrefill",
    "HeadPlace",
    "LocalGlobal",
    "MInference",
    "MInferenceHead",
    "Method",
    "SlidingWindow",
    "Streaming",
    "Strided",
    "TriShape",
    "Triangle",
    "XAttention",
    "available_methods",
    "method_class",
    "method_from_dict",
]
