"""Which backend computes an operator, and why. Kernels plug in here; `reference` serves everything else.

`SPARSE_HF_BACKEND=name` forces a backend; one that cannot serve a call then raises instead of falling back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "SPARSE_HF_BACKEND"


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a backend is asked to serve."""

    op: str
    device_type: str
    dtype: torch.dtype
    head_dim: int
    layout: AttentionLayout | None = None

    @classmethod
    def of(cls, op: str, q: Tensor, layout: AttentionLayout) -> AttentionRequest:
        return cls(op=op, device_type=q.device.type, dtype=q.dtype, head_dim=q.shape[-1], layout=layout)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the operators.

    Args:
        name: what `SPARSE_HF_BACKEND` and `sparse-hf env` call it.
        refuses: returns None if the backend can serve a request, else the reason why not.
        sparse_attention: `(q, k, v, layout, *, positions, scale) -> (out, lse)`.
        mixed_attention: `(q, k, v, gate, full, sparse, *, positions, scale, skip_saturated) -> out`.
    """

    name: str
    refuses: Callable[[AttentionRequest], str | None]
    sparse_attention: Callable[..., tuple[Tensor, Tensor]]
    mixed_attention: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen backend and why it was chosen."""

    backend: Backend
    reason: str


def _reference_backend() -> Backend:
    from sparse_hf_kernels.mixed_attention.reference import mixed_attention_reference
    from sparse_hf_kernels.sparse_attention.reference import sparse_attention_reference

    return Backend(
        name="reference",
        refuses=lambda request: None,
        sparse_attention=sparse_attention_reference,
        mixed_attention=mixed_attention_reference,
    )


_registered: list[Backend] = []
_said: set[str] = set()


def register_backend(backend: Backend) -> None:
    """Puts a backend ahead of those registered before it.

    Raises:
        ValueError: if the name is taken.
    """
    if backend.name in available_backends():
        raise ValueError(f"backend {backend.name!r} is registered already; unregister it first")
    _registered.insert(0, backend)


def unregister_backend(name: str) -> None:
    """Takes a registered backend out again; `reference` always stays."""
    _registered[:] = [backend for backend in _registered if backend.name != name]


def available_backends() -> tuple[str, ...]:
    """Names in the order in which they are asked."""
    return (*(backend.name for backend in _registered), "reference")


def select_backend(request: AttentionRequest) -> Selection:
    """The first backend that serves the request, or the one that `SPARSE_HF_BACKEND` names.

    Raises:
        ValueError: if `SPARSE_HF_BACKEND` names an unknown backend or one that refuses the request.
    """
    candidates = [*_registered, _reference_backend()]
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced:
        chosen = next((backend for backend in candidates if backend.name == forced), None)
        if chosen is None:
            known = ", ".join(available_backends())
            raise ValueError(f"{BACKEND_VARIABLE}={forced!r} is unknown; available here: {known}")
        if refusal := chosen.refuses(request):
            raise ValueError(f"{BACKEND_VARIABLE}={forced!r} cannot serve {request.op}: {refusal}; unset the variable")
        return Selection(backend=chosen, reason=f"forced by {BACKEND_VARIABLE}")
    refusals: list[str] = []
    for backend in candidates:
        refusal = backend.refuses(request)
        if refusal is None:
            reason = "; ".join(refusals) or f"first of {', '.join(available_backends())}"
            _say_fallback(request, backend, refusals)
            return Selection(backend=backend, reason=reason)
        refusals.append(f"{backend.name}: {refusal}")
    raise AssertionError("the reference backend refuses nothing")


def _say_fallback(request: AttentionRequest, backend: Backend, refusals: list[str]) -> None:
    """Says once per cause why a call does not run on a fused kernel."""
    if request.device_type == "cuda" and backend.name == "reference" and not refusals:
        refusals = [f"no fused kernel is registered for {request.device_type}"]
    message = f"{request.op} runs on the {backend.name!r} backend ({'; '.join(refusals)})"
    if refusals and message not in _said:
        _said.add(message)
        logger.warning(message)
