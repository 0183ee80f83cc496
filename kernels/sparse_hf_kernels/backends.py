"""The backends of the package, in the order in which they are asked. Kernels are imported when they serve a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import TILE, AttentionRequest, Backend, gpu_capability, layout_cuts_blocks
from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.mixed_attention.branches import Branches, branches_of
from sparse_hf_kernels.mixed_attention.reference import mixed_attention_reference
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.sparse_attention.problem import AttentionKernels, AttentionProblem
from sparse_hf_kernels.sparse_attention.reference import sparse_attention_reference
from sparse_hf_kernels.sparse_attention.reference_backward import sparse_attention_backward_reference
from sparse_hf_kernels.sparse_attention.sdpa import NAME, sdpa_attention, sdpa_defers, sdpa_refuses
from sparse_hf_kernels.tiles import RowGeometry

GLUON_HEAD_DIMS = (64, 128, 256)
GLUON_DTYPES = (torch.bfloat16, torch.float16)


def problem_of(
    q: Tensor, layout: AttentionLayout, positions: TokenPositions, scale: float, deterministic: bool
) -> AttentionProblem:
    """What fused kernels are given for a call."""
    geometry = RowGeometry.of(positions)
    if not geometry.is_closed_form:
        geometry = geometry.to(q.device)
    return AttentionProblem(layout=layout, geometry=geometry, scale=scale, deterministic=deterministic)


@dataclass(frozen=True)
class _Fused:
    """The operators on the kernels that a package exports as `KERNELS`."""

    package: str

    @cached_property
    def kernels(self) -> AttentionKernels:
        return import_module(self.package).KERNELS

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: AttentionLayout,
        *,
        positions: TokenPositions,
        scale: float,
        deterministic: bool,
        selection: BlockSelection | None = None,
    ) -> tuple[Tensor, Tensor]:
        from sparse_hf_kernels.sparse_attention.autograd import fused_attention
        from sparse_hf_kernels.sparse_attention.selected import selected_attention

        problem = problem_of(q, layout, positions, scale, deterministic)
        if selection is None:
            return fused_attention(self.kernels, q, k, v, problem)
        return selected_attention(self.kernels, q, k, v, problem, selection)

    def backward(
        self,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: AttentionLayout,
        *,
        positions: TokenPositions,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from sparse_hf_kernels.sparse_attention.autograd import fused_backward

        problem = problem_of(q, layout, positions, scale, deterministic)
        return fused_backward(self.kernels, grad_out, grad_lse, q, k, v, out, lse, problem)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, full: AttentionLayout, sparse: AttentionLayout, **call: Any
    ) -> Tensor:
        from sparse_hf_kernels.mixed_attention.fused import fused_mixed_attention

        return fused_mixed_attention(self.kernels, q, k, v, gate, _branches(q, gate, full, sparse, **call))

    def mix_forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, full: AttentionLayout, sparse: AttentionLayout, **call: Any
    ) -> tuple[Tensor, ...]:
        from sparse_hf_kernels.mixed_attention.fused import mixed_forward

        return mixed_forward(self.kernels, q, k, v, gate, _branches(q, gate, full, sparse, **call))

    def mix_backward(
        self, grad_out: Tensor, saved: tuple[Tensor, ...], full: AttentionLayout, sparse: AttentionLayout, **call: Any
    ) -> tuple[Tensor, ...]:
        from sparse_hf_kernels.mixed_attention.fused import mixed_backward

        q, _, _, gate, *_ = saved
        return mixed_backward(self.kernels, grad_out, saved, _branches(q, gate, full, sparse, **call))

    def backend(self, name: str, refuses: Callable[[AttentionRequest], str | None]) -> Backend:
        return Backend(
            name=name,
            refuses=refuses,
            sparse_attention=self.attend,
            mixed_attention=self.mix,
            sparse_attention_backward=self.backward,
            mixed_attention_forward=self.mix_forward,
            mixed_attention_backward=self.mix_backward,
        )


def _branches(
    q: Tensor,
    gate: Tensor,
    full: AttentionLayout,
    sparse: AttentionLayout,
    *,
    positions: TokenPositions,
    scale: float,
    skip_saturated: bool,
    deterministic: bool,
) -> Branches:
    return branches_of(
        problem_of(q, full, positions, scale, deterministic),
        problem_of(q, sparse, positions, scale, deterministic),
        gate.tolist() if skip_saturated else None,
    )


GLUON = _Fused("sparse_hf_kernels.sparse_attention.gluon")
TRITON = _Fused("sparse_hf_kernels.sparse_attention.triton")


def gluon_refuses(request: AttentionRequest) -> str | None:
    """Why the Hopper kernels cannot serve a request; None if they can."""
    if request.device_type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU of compute capability 9.0, got device {request.device_type!r}"
    capability = request.capability or gpu_capability()
    if capability != (9, 0):
        return f"needs compute capability 9.0, got {'no GPU' if capability is None else '{}.{}'.format(*capability)}"
    if request.dtype not in GLUON_DTYPES:
        return f"serves bfloat16 and float16, got {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim not in GLUON_HEAD_DIMS:
        return f"serves head_dim {', '.join(map(str, GLUON_HEAD_DIMS))}, got {request.head_dim}"
    if (refusal := _value_refusal(request)) is not None:
        return refusal
    if request.selected_blocks not in (None, TILE):
        return f"serves selections of blocks of {TILE}, got {request.selected_blocks}"
    if request.cuts_blocks or (request.layout is not None and layout_cuts_blocks(request.layout)):
        return (
            f"serves block lists whose borders are multiples of {TILE} (block_size, num_dense_rows, and the position "
            "of the first query of unpadded sequences)"
        )
    return _gluon_missing()


@lru_cache(maxsize=1)
def _gluon_missing() -> str | None:
    try:
        GLUON.kernels  # noqa: B018  (the import is the question)
    except (ImportError, AttributeError) as error:
        return f"needs Triton 3.6 or a later one with the same Gluon names ({error})"
    return None


def triton_refuses(request: AttentionRequest) -> str | None:
    """Why the portable kernels cannot serve a request; None if they can."""
    # Asked here first, so that calls on the CPU need not import Triton to learn that it has no use for them.
    if request.device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs an NVIDIA GPU, got device {request.device_type!r}"
    if (refusal := _value_refusal(request)) is not None:
        return refusal
    try:
        kernels = import_module(TRITON.package)
    except ImportError as error:
        return f"needs Triton ({error})"
    return kernels.refuses(request)


def _value_refusal(request: AttentionRequest) -> str | None:
    if request.value_dim in (None, request.head_dim):
        return None
    return f"serves values of the keys' head_dim {request.head_dim}, got {request.value_dim}"


SDPA = Backend(
    name=NAME,
    refuses=sdpa_refuses,
    defers=sdpa_defers,
    sparse_attention=sdpa_attention,
    mixed_attention=None,
)
REFERENCE = Backend(
    name="reference",
    refuses=lambda request: None,
    sparse_attention=sparse_attention_reference,
    mixed_attention=mixed_attention_reference,
    sparse_attention_backward=sparse_attention_backward_reference,
)

BUILT_IN: tuple[Backend, ...] = (
    SDPA,
    GLUON.backend("gluon", gluon_refuses),
    TRITON.backend("triton", triton_refuses),
    REFERENCE,
)
