"""The portable backend: plain Triton for NVIDIA GPUs from sm_80 on, and for Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import AttentionRequest
from sparse_hf_kernels.sparse_attention.problem import AttentionKernels, AttentionProblem
from sparse_hf_kernels.sparse_attention.triton.backward import backward
from sparse_hf_kernels.sparse_attention.triton.configs import MAX_HEAD_DIM, interpreted
from sparse_hf_kernels.sparse_attention.triton.forward import forward

__all__ = ["KERNELS", "refuses"]


class _TritonKernels:
    forward = staticmethod(forward)
    backward = staticmethod(backward)

    @staticmethod
    def query_sums(q: Tensor, problem: AttentionProblem) -> None:
        """None: dQ leaves its kernel rounded."""


KERNELS: AttentionKernels = _TritonKernels()


def refuses(request: AttentionRequest) -> str | None:
    """Why these kernels cannot serve a request; None if they can."""
    served = (torch.float32, torch.float16) if interpreted() else (torch.float32, torch.bfloat16, torch.float16)
    if request.dtype not in served:
        # Triton's interpreter gets bf16 wrong without a word.
        return f"dtype {request.dtype} is not served{' by the interpreter' if interpreted() else ''}"
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim {request.head_dim} exceeds {MAX_HEAD_DIM}"
    if interpreted():
        return None
    if request.device_type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, got device {request.device_type!r}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or more"
    return None
