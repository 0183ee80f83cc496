"""Which backend computes an operator, and why: those registered by users, then those of `backends.py` in their order.

`SPARSE_HF_BACKEND=name` forces a backend; one that cannot serve a call then raises instead of falling back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions
from sparse_hf_kernels.ptxas import warn_of_unsafe_ptxas
from sparse_hf_kernels.selection import BlockSelection

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "SPARSE_HF_BACKEND"


TILE = 128
"""The borders that blocks must share, so that no tile of a fused kernel cuts one."""


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a backend is asked to serve.

    Args:
        op, device_type, dtype, head_dim: of the call.
        layout: what the heads read; None asks about the others alone.
        value_dim: head_dim of the values, where it differs.
        capability: of the GPU; None means the current device's.
        cuts_blocks: the call has block lists whose borders are not those of tiles, by their size or by where the
            queries stand.
        selected_blocks: block size of the call's selection; None without one.
        num_rows: query heads times rows of the batch.
        dense_len: tokens of whole unpadded sequences, of which all heads read every earlier token; None for another
            call, or if that is not known.
        needs_lse: the log-sum-exp is asked for.
        deterministic: so must the gradients be.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    head_dim: int
    layout: AttentionLayout | None = None
    value_dim: int | None = None
    capability: tuple[int, int] | None = None
    cuts_blocks: bool = False
    selected_blocks: int | None = None
    num_rows: int = 0
    dense_len: int | None = None
    needs_lse: bool = True
    deterministic: bool = False

    @classmethod
    def of(
        cls,
        op: str,
        q: Tensor,
        layout: AttentionLayout,
        *,
        positions: TokenPositions | None = None,
        v: Tensor | None = None,
        full: AttentionLayout | None = None,
        selection: BlockSelection | None = None,
        needs_lse: bool = True,
        deterministic: bool = False,
    ) -> AttentionRequest:
        """The request of a call; `full` is the other layout of `mixed_attention`."""
        on_gpu = q.device.type == "cuda"
        layouts = (layout,) if full is None else (layout, full)
        return cls(
            op=op,
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            layout=layout,
            value_dim=None if v is None or v.shape[-1] == q.shape[-1] else v.shape[-1],
            capability=gpu_capability(q.device.index) if on_gpu else None,
            selected_blocks=None if selection is None else selection.block_size,
            cuts_blocks=on_gpu and any(_cuts_blocks(each, positions) for each in layouts),
            num_rows=q.shape[0] * q.shape[1],
            dense_len=None if positions is None else dense_len(q.shape[2], positions.kv_len, layout, positions),
            needs_lse=needs_lse,
            deterministic=deterministic,
        )


def dense_len(q_len: int, kv_len: int, layout: AttentionLayout, positions: TokenPositions | None) -> int | None:
    """`AttentionRequest.dense_len` of a call; positions None are those of unpadded tokens from 0 on."""
    if q_len != kv_len or not 0 < q_len <= layout.dense_len:
        return None
    if positions is None:
        return q_len
    whole = positions.offset == 0 == positions.k_offset and positions.q_len == q_len == positions.kv_len
    return q_len if whole else None


@lru_cache
def gpu_capability(index: int | None = None) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None without one."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def layout_cuts_blocks(layout: AttentionLayout) -> bool:
    """The layout has block lists whose borders are not those of tiles, wherever the queries stand."""
    blocks = [pattern.blocks for pattern in layout.patterns if pattern.blocks is not None]
    return any(block.block_size % TILE for block in blocks) or bool(blocks and layout.num_dense_rows % TILE)


def _cuts_blocks(layout: AttentionLayout, positions: TokenPositions | None) -> bool:
    if all(pattern.blocks is None for pattern in layout.patterns):
        return False
    if layout_cuts_blocks(layout):
        return True
    if positions is None:
        return False
    return positions.offset is None or bool(positions.k_offset or positions.offset % TILE)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the operators.

    Args:
        name: what `SPARSE_HF_BACKEND` and `sparse-hf env` call it.
        refuses: returns None if the backend can serve a request, else the reason why not.
        defers: returns None unless the backend leaves a request to those after it although it could serve it, else the
            reason. A forced backend is not asked.
        sparse_attention: `(q, k, v, layout, *, positions, scale, deterministic) -> (out, lse)`, differentiable. Where
            patterns are selected it is given `selection` too. The log-sum-exp may be None unless `needs_lse`.
        mixed_attention: `(q, k, v, gate, full, sparse, *, positions, scale, skip_saturated, deterministic) -> out`;
            None for a backend that refuses such requests.
        sparse_attention_backward: `(grad_out, grad_lse, q, k, v, out, lse, layout, *, positions, scale, deterministic)
            -> (grad_q, grad_k, grad_v)`, which compiled graphs call; by default that of the reference.
        mixed_attention_forward: as `mixed_attention`, without a graph `-> (out, wide_out, wide_lse, sparse_out,
            sparse_lse)`, for compiled graphs: what is kept for the next, shaped as two results of `sparse_attention`.
        mixed_attention_backward: `(grad_out, (q, k, v, gate, *kept), full, sparse, *, positions, scale,
            skip_saturated, deterministic) -> (grad_q, grad_k, grad_v, grad_gate)`. By default both are made of two
            calls of `sparse_attention` and `sparse_attention_backward`.
    """

    name: str
    refuses: Callable[[AttentionRequest], str | None]
    sparse_attention: Callable[..., tuple[Tensor, Tensor | None]]
    mixed_attention: Callable[..., Tensor] | None
    sparse_attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    mixed_attention_forward: Callable[..., tuple[Tensor, ...]] | None = None
    mixed_attention_backward: Callable[..., tuple[Tensor, ...]] | None = None
    defers: Callable[[AttentionRequest], str | None] = lambda request: None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen backend and why it was chosen."""

    backend: Backend
    reason: str


@lru_cache(maxsize=1)
def _built_in() -> tuple[Backend, ...]:
    # backends.py imports the operators' implementations, some of which import this module.
    from sparse_hf_kernels.backends import BUILT_IN

    return BUILT_IN


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
    """Takes a registered backend out again; those of the package always stay."""
    _registered[:] = [backend for backend in _registered if backend.name != name]


def any_registered() -> bool:
    """Some backend is not of this package."""
    return bool(_registered)


def available_backends() -> tuple[str, ...]:
    """Names in the order in which they are asked."""
    return tuple(backend.name for backend in (*_registered, *_built_in()))


def select_backend(request: AttentionRequest) -> Selection:
    """The first backend that serves the request, or the one that `SPARSE_HF_BACKEND` names.

    Raises:
        ValueError: if `SPARSE_HF_BACKEND` names an unknown backend or one that refuses the request.
    """
    candidates = (*_registered, *_built_in())
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced:
        chosen = next((backend for backend in candidates if backend.name == forced), None)
        if chosen is None:
            known = ", ".join(available_backends())
            raise ValueError(f"{BACKEND_VARIABLE}={forced!r} is unknown; available here: {known}")
        if refusal := chosen.refuses(request):
            raise ValueError(f"{BACKEND_VARIABLE}={forced!r} cannot serve {request.op}: {refusal}; unset the variable")
        _warn_of_compiler(request, chosen)
        return Selection(backend=chosen, reason=f"forced by {BACKEND_VARIABLE}")
    refusals: list[str] = []
    for backend in candidates:
        refusal = backend.refuses(request) or backend.defers(request)
        if refusal is None:
            reason = "; ".join(refusals) or f"first of {', '.join(available_backends())}"
            _say_fallback(request, backend, refusals)
            _warn_of_compiler(request, backend)
            return Selection(backend=backend, reason=reason)
        refusals.append(f"{backend.name}: {refusal}")
    raise AssertionError("the reference backend refuses nothing")


def _say_fallback(request: AttentionRequest, backend: Backend, refusals: list[str]) -> None:
    """Says once per cause why a call does not run on the backend that was made for its device."""
    # SDPA takes short calls alone; that others do not run there is no news.
    expected: tuple[str, ...] = ("sdpa: ",) if request.device_type == "cuda" else ("sdpa: ", "gluon: ", "triton: ")
    if backend.name == "triton" and (request.capability or gpu_capability()) != (9, 0):
        expected = ("sdpa: ", "gluon: ")
    refusals = [refusal for refusal in refusals if not refusal.startswith(expected)]
    message = f"{request.op} runs on the {backend.name!r} backend ({'; '.join(refusals)})"
    if refusals and message not in _said:
        _said.add(message)
        logger.warning(message)


def _warn_of_compiler(request: AttentionRequest, backend: Backend) -> None:
    if backend.name in ("gluon", "triton") and (request.capability or gpu_capability()) == (9, 0):
        warn_of_unsafe_ptxas()
