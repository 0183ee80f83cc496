"""Which two attentions a blend is made of.

Full and sparse attention, run one after the other, read every key of the sparse pattern twice. Where the pattern is a
window with sinks, what it leaves out is causal attention again: a query at position i reads the keys
`num_sink_tokens <= j <= i - window`, as if it stood `window` earlier in a sequence without its first keys. The kernels
then compute that and the sparse pattern, each pair of query and key once, and the blend puts full attention together
from the two and their log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_hf_kernels.layout import UNBOUNDED, AttentionLayout, HeadPattern
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.tiles import RowGeometry
from sparse_hf_kernels.tiles.geometry import EMPTY_ROW


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One of the two attentions.

    Args:
        problem: of its heads and keys alone.
        heads: the KV heads that it serves; None for all of them.
        first_key: keys in slots before it are left out.
    """

    problem: AttentionProblem
    heads: tuple[int, ...] | None = None
    first_key: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Branches:
    """Both of them.

    Args:
        wide: full attention, or with `disjoint` the keys that `sparse` leaves out of it.
        sparse: attention by the sparse layout.
    """

    wide: Branch
    sparse: Branch
    disjoint: bool


def branches_of(full: AttentionProblem, sparse: AttentionProblem, gate: list[float] | None) -> Branches:
    """The two attentions of a call.

    Args:
        full, sparse: the problems of the two layouts.
        gate: the gates, if branches of weight exactly 0 are to be left out.
    """
    # By inequality, so that a gate of NaN is seen.
    wide_heads = tuple(h for h, z in enumerate(gate or ()) if z != 0)
    sparse_heads = tuple(h for h, z in enumerate(gate or ()) if z != 1)
    if gate is None or len(wide_heads) == len(sparse_heads) == len(gate):
        beyond = _beyond(full, sparse)
        wide = Branch(problem=full) if beyond is None else beyond
        return Branches(wide=wide, sparse=Branch(problem=sparse), disjoint=beyond is not None)
    return Branches(wide=_of_heads(full, wide_heads), sparse=_of_heads(sparse, sparse_heads), disjoint=False)


def _of_heads(problem: AttentionProblem, heads: tuple[int, ...]) -> Branch:
    if len(heads) == problem.layout.num_kv_heads:
        return Branch(problem=problem)
    # A branch without heads is never run; layouts cannot be empty.
    layout = problem.layout.select(heads) if heads else problem.layout
    return Branch(problem=replace(problem, layout=layout), heads=heads)


def _beyond(full: AttentionProblem, sparse: AttentionProblem) -> Branch | None:
    """What dense attention reads besides a window and sinks; None for other layouts, and if there is nothing."""
    layout, geometry = sparse.layout, sparse.geometry
    pattern = layout.patterns[0]
    if len(layout.groups) > 1 or pattern.blocks is not None or pattern.selected or pattern.num_last_tokens:
        return None
    if not (full.layout.is_dense and full.layout.causal and layout.causal):
        return None
    # Dense rows within the window are rows of the window.
    if full.layout.max_distance != layout.max_distance or layout.num_dense_rows > pattern.window:
        return None
    if pattern.window >= min(layout.max_distance, geometry.kv_len) or pattern.num_sink_tokens >= geometry.kv_len:
        return None
    far = layout.max_distance if layout.max_distance == UNBOUNDED else layout.max_distance - pattern.window
    kept = AttentionLayout.dense(layout.num_kv_heads, max_distance=far)
    if not geometry.is_closed_form:
        moved = _moved_rows(geometry, pattern)
        return Branch(problem=replace(full, layout=kept, geometry=moved))
    first_key = max(0, geometry.start + pattern.num_sink_tokens)
    moved = RowGeometry(
        q_len=geometry.q_len,
        kv_len=geometry.kv_len - first_key,
        offset=geometry.offset - pattern.window - first_key,
    )
    if moved.offset + moved.q_len <= 0:
        return None
    return Branch(problem=replace(full, layout=kept, geometry=moved), first_key=first_key)


def _moved_rows(geometry: RowGeometry, pattern: HeadPattern) -> RowGeometry:
    """Rows `window` earlier in sequences without their sinks; kept with the geometry, which layers share."""
    known: dict[HeadPattern, RowGeometry] = geometry.__dict__.setdefault("_beyond", {})
    if pattern not in known:
        assert geometry.q_pos is not None and geometry.q_start is not None
        first, last = geometry.q_start + pattern.num_sink_tokens, geometry.q_pos - pattern.window
        reads = (geometry.q_pos >= 0) & (last >= first)
        known[pattern] = replace(
            geometry, q_start=torch.where(reads, first, 0), q_pos=torch.where(reads, last, EMPTY_ROW)
        )
    return known[pattern]


def queries_of(branch: Branch, x: Tensor, num_kv_heads: int) -> Tensor:
    """The branch's heads of x `[batch, num_heads, ...]`."""
    return x if branch.heads is None else x[:, rows_of(branch, x.shape[1] // num_kv_heads)]


def keys_of(branch: Branch, x: Tensor) -> Tensor:
    """The branch's heads and slots of k or v."""
    return (x if branch.heads is None else x[:, list(branch.heads)])[:, :, branch.first_key :]


def rows_of(branch: Branch, group: int) -> list[int]:
    """The branch's query heads."""
    assert branch.heads is not None
    return [head * group + g for head in branch.heads for g in range(group)]
