"""The Hopper backend: Gluon kernels with TMA, warp specialisation and asynchronous WGMMA."""

from __future__ import annotations

from sparse_hf_kernels.sparse_attention.gluon.backward import attention_backward, query_sums
from sparse_hf_kernels.sparse_attention.gluon.forward import attention_forward
from sparse_hf_kernels.sparse_attention.problem import AttentionKernels

__all__ = ["KERNELS"]


class _GluonKernels:
    forward = staticmethod(attention_forward)
    backward = staticmethod(attention_backward)
    query_sums = staticmethod(query_sums)


KERNELS: AttentionKernels = _GluonKernels()
