"""Attention from `torch.sparse`: sampled product, softmax of the rows, sparse product, on the tokens kept, as CSR."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_hf.bench.contenders import Call
from sparse_hf.bench.workload import Shape
from sparse_hf_kernels import AttentionLayout, HeadPattern

GIB = 2**30
MAX_PAIRS = 2**31 - 1
"""Entries that int32 indices can count."""

HELD_BYTES = 8
"""Per pair of each distinct pattern, from call to call: the int32 column and row."""
WORKING_BYTES = 8
"""Per pair of one pattern, during a call: the fp32 weight, and what is subtracted from it."""

CHUNK_ELEMENTS = 2**24
"""Of the boolean masks that the indices are read from."""


@dataclass(frozen=True)
class TorchSparse:
    """`torch.sparse.sampled_addmm`, a softmax over the stored values and a CSR product, one query head after the other.

    In fp32: no sampled product takes bf16. One sequence, forward alone.

    Args:
        budget_gib: refuses patterns whose indices and values take more.
        name: what tables call it.
    """

    budget_gib: float = 1.0
    name: str = "torch.sparse fp32"

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        pairs = [int(layout.row_counts(pattern, shape.seq_len).sum()) for pattern, _ in layout.groups]
        if max(pairs) > MAX_PAIRS:
            return f"a head keeps {max(pairs):,} pairs of {shape.seq_len} tokens, more than int32 indices can count"
        needs = (HELD_BYTES * sum(pairs) + WORKING_BYTES * max(pairs)) / GIB
        if needs > self.budget_gib:
            return (
                f"CSR and values of {shape.seq_len} tokens would take {needs:.2f} GiB, "
                f"more than the {self.budget_gib:g} GiB given in this run"
            )
        return None

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        indices = [(Csr.of(layout, pattern, q.shape[2], q.device), heads) for pattern, heads in layout.groups]
        # `out=` knows no gradients.
        queries, keys, values = (x.detach()[0] for x in (q, k, v))
        group_size, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5

        def forward() -> Tensor:
            out = torch.empty_like(queries)
            for csr, kv_heads in indices:
                matrix = csr.matrix()
                for kv_head in kv_heads:
                    key, value = keys[kv_head].float().t(), values[kv_head].float()
                    for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                        out[head] = csr.attend(matrix, queries[head].float(), key, value, scale)
            return out[None]

        return Call(forward=forward, inputs=(q, k, v), held_bytes=sum(csr.nbytes for csr, _ in indices))


@dataclass(frozen=True, kw_only=True)
class Csr:
    """Which keys each query keeps: int32 `row_ptr [seq_len + 1]`, and per pair its `columns` and `rows`."""

    row_ptr: Tensor
    columns: Tensor
    rows: Tensor

    @classmethod
    def of(cls, layout: AttentionLayout, pattern: HeadPattern, seq_len: int, device: torch.device) -> Csr:
        counts = layout.row_counts(pattern, seq_len)
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)
        positions = torch.arange(seq_len, device=device)
        columns = [
            layout.allowed(pattern, rows[:, None], positions[None], seq_len - 1).nonzero()[:, 1].to(torch.int32)
            for rows in positions.split(max(1, CHUNK_ELEMENTS // seq_len))
        ]
        rows = positions.to(torch.int32).repeat_interleave(counts.to(device), output_size=int(counts.sum()))
        return cls(row_ptr=row_ptr, columns=torch.cat(columns), rows=rows)

    @property
    def nbytes(self) -> int:
        return self.row_ptr.nbytes + self.columns.nbytes + self.rows.nbytes

    def matrix(self) -> Tensor:
        """A CSR tensor of zeros over these indices, whose values can be written."""
        seq_len = len(self.row_ptr) - 1
        zeros = torch.zeros(len(self.columns), device=self.columns.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                self.row_ptr, self.columns, zeros, size=(seq_len, seq_len), check_invariants=False
            )

    def attend(self, matrix: Tensor, q: Tensor, k_transposed: Tensor, v: Tensor, scale: float) -> Tensor:
        """One head's output, fp32 `[seq_len, head_dim]`, 0 where a query keeps no key. Overwrites matrix's values."""
        torch.sparse.sampled_addmm(matrix, q, k_transposed, beta=0.0, alpha=scale, out=matrix)
        weights = matrix.values()
        weights -= torch.segment_reduce(weights, "max", offsets=self.row_ptr).index_select(0, self.rows)
        sums = torch.segment_reduce(weights.exp_(), "sum", offsets=self.row_ptr)
        return (matrix @ v) / sums.clamp_min(1)[:, None]  # the largest weight of a row is 1
