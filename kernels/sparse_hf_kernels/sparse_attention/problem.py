"""What fused kernels are given besides tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.selection import BlockSelection
from sparse_hf_kernels.tiles import RowGeometry


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionProblem:
    """One call of sparse attention, apart from its tensors.

    Args:
        layout: what each KV head reads.
        geometry: where rows and keys stand, on the device of the tensors.
        scale: factor on the scores.
        deterministic: the backward pass gives the same bits in every run.
        selection: the blocks that selected patterns read; it has no columns here.
    """

    layout: AttentionLayout
    geometry: RowGeometry
    scale: float
    deterministic: bool
    selection: BlockSelection | None = None


class QuerySums(Protocol):
    """dQ of several backward passes over the same queries, added up before it is rounded."""

    def add(
        self,
        grad_out: Tensor,
        delta: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        problem: AttentionProblem,
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionKernels.backward`, with dQ added to the sums; the scale must be that of the first pass."""
        ...

    def total(self) -> Tensor:
        """dQ, like q."""
        ...


class AttentionKernels(Protocol):
    """A backend's kernels. Slots of k and v without token are zeros when they get here."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """Output like q, and the natural log-sum-exp `[batch, num_heads, q_len]`, fp32 (rows without key: 0, -inf)."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        delta: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        problem: AttentionProblem,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v. `delta [batch, num_heads, q_len]` is rowsum(grad_out * out) - grad of the LSE, fp32."""
        ...

    def query_sums(self, q: Tensor, problem: AttentionProblem) -> QuerySums | None:
        """Zero sums for several passes over q, or None if `backward` has no sums to share."""
        ...
