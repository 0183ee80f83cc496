"""What takes part: the project's operators, and what every contender has to offer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_hf.bench.workload import Shape
from sparse_hf.dynamic import LayerHeads, attend_unpadded, select_blocks
from sparse_hf.methods import DynamicMethod
from sparse_hf_kernels import (
    AttentionLayout,
    AttentionRequest,
    BlockSelection,
    mixed_attention,
    select_backend,
    sparse_attention,
)
from sparse_hf_kernels.dispatch import BACKEND_VARIABLE, dense_len


@dataclass(frozen=True, kw_only=True)
class Call:
    """A contender bound to its inputs.

    Args:
        forward: computes the output.
        inputs: the leaves that a backward differentiates.
        heads_first: the output is `[batch, heads, length, head_dim]`, else `[batch, length, heads, head_dim]`.
        held_bytes: device memory that it keeps from call to call beside its inputs: an index, say.
        selection: what the heads of selected patterns read of these inputs.
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    heads_first: bool = True
    held_bytes: int = 0
    selection: BlockSelection | None = None


class Contender(Protocol):
    """An attention that can be timed."""

    @property
    def name(self) -> str: ...

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        """Why it cannot take part, or None."""

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        """Readies everything that a user would ready once; no part of it is timed."""


@contextmanager
def _forced(backend: str | None) -> Iterator[None]:
    if backend is None:
        yield
        return
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before


@dataclass(frozen=True, kw_only=True)
class SparseHF:
    """`sparse_attention`.

    Args:
        backend: forces one, as `SPARSE_HF_BACKEND` does.
        device: "cuda", where the reference would take forever and is refused; "cpu" serves tests.
    """

    backend: str | None = None
    device: str = "cuda"
    op: str = "sparse_attention"

    @property
    def name(self) -> str:
        return f"sparse_hf {self.backend}" if self.backend else "sparse_hf"

    @property
    def selected_blocks(self) -> int | None:
        """Block size of what it selects by q and k, if it does."""
        return None

    def chosen_backend(self, shape: Shape, layout: AttentionLayout) -> str:
        """The backend that dispatch picks.

        Raises:
            ValueError: if the one that is forced cannot serve this.
        """
        request = AttentionRequest(
            op=self.op,
            device_type=self.device,
            dtype=shape.dtype,
            head_dim=shape.head_dim,
            layout=layout,
            selected_blocks=self.selected_blocks,
            num_rows=shape.num_heads,
            dense_len=dense_len(shape.seq_len, shape.seq_len, layout, None),
        )
        with _forced(self.backend):
            return select_backend(request).backend.name

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        try:
            chosen = self.chosen_backend(shape, layout)
        except ValueError as error:
            return str(error)
        if chosen == "reference" and self.device != "cpu":
            return f"no fused kernel serves {self.op} at head_dim {shape.head_dim}; `sparse-hf env` says why"
        return None

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        def forward() -> Tensor:
            with _forced(self.backend):
                return sparse_attention(q, k, v, layout)

        return Call(forward=forward, inputs=(q, k, v))


@dataclass(frozen=True, kw_only=True)
class DynamicHF(SparseHF):
    """A dynamic method on all heads, whose layout is of selected patterns: every call chooses, then attends."""

    method: DynamicMethod

    @property
    def selected_blocks(self) -> int:
        return self.method.block_size

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        # There the forced blocks are all.
        if shape.seq_len <= 2 * self.method.block_size:
            return f"reads every key of {shape.seq_len} tokens and chooses nothing"
        return super().refuses(shape, layout)

    def select(self, q: Tensor, k: Tensor, layout: AttentionLayout) -> BlockSelection:
        """The choice alone."""
        return select_blocks(q.detach(), k.detach(), self._heads(layout), scale=q.shape[-1] ** -0.5)

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        heads, scale = self._heads(layout), q.shape[-1] ** -0.5

        def forward() -> Tensor:
            with _forced(self.backend):
                return attend_unpadded(q, k, v, heads, scale=scale)[0]

        return Call(forward=forward, inputs=(q, k, v), selection=self.select(q, k, layout))

    def _heads(self, layout: AttentionLayout) -> LayerHeads:
        return LayerHeads.of(layout, (self.method,) * layout.num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class MixedHF(SparseHF):
    """`mixed_attention` of dense and the given layout, with gates strictly between 0 and 1, so none can be skipped."""

    op: str = "mixed_attention"

    @property
    def name(self) -> str:
        return "sparse_hf two-branch"

    @staticmethod
    def gates(num_kv_heads: int, device: torch.device) -> Tensor:
        """fp32 `[num_kv_heads]`, a leaf."""
        return torch.linspace(0.1, 0.9, num_kv_heads, device=device).requires_grad_()

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        full, gate = AttentionLayout.dense(layout.num_kv_heads), self.gates(layout.num_kv_heads, q.device)
        return Call(forward=lambda: mixed_attention(q, k, v, gate, full, layout), inputs=(q, k, v, gate))
