"""`minference`: per query head columns and diagonals, pooled blocks, or sinks and a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparse_hf.methods.dynamic import (
    DynamicMethod,
    block_distances,
    blockwise,
    keep_marked,
    merge,
    on_diagonals,
    per_head,
    require_share,
    take_heads,
)
from sparse_hf_kernels import BlockSelection
from sparse_hf_kernels.scoring import last_q_sums, pooled_block_scores, select_top_k
from sparse_hf_kernels.scoring.geometry import BlockGrid

Kind = Literal["vertical_slash", "block_sparse", "a_shape"]

NUM_LAST_QUERIES = 64
NUM_SINK_COLUMNS = 30
"""The first columns, which every vertical-slash head keeps."""
NUM_NEAR_DIAGONALS = 100
"""The nearest diagonals, which every vertical-slash head keeps."""


@dataclass(frozen=True, kw_only=True)
class MInferenceHead:
    """The pattern of one query head; the parameters are those of `MInference`, which names them."""

    kind: Kind = "vertical_slash"
    vertical_size: int = 1000
    slash_size: int = 6096
    adaptive_budget: float | None = None
    top_k: int = 50
    n_init: int = 128
    n_local: int = 3968

    def sizes(self, length: int) -> tuple[int, int]:
        """Columns and diagonals of a vertical-slash head over `length` keys."""
        vertical, slash = self.vertical_size, self.slash_size
        if self.adaptive_budget is not None:
            # Rounding down must not cost one where a fifth of the budget is a whole number.
            vertical, slash = (int(self.adaptive_budget * part * length + 1e-6) for part in (0.2, 0.8))
        return min(max(vertical, NUM_SINK_COLUMNS), length), min(max(slash, NUM_NEAR_DIAGONALS), length)


@dataclass(frozen=True, kw_only=True)
class MInference(DynamicMethod):
    """One of three patterns per query head.

    - `vertical_slash`: the last `min(64, q_len)` queries of the call stand for all, so that chunked prefill estimates
      in each chunk anew. Of their attention the `vertical_size` columns and the `slash_size` diagonals with the largest
      sums, the first 30 columns and the nearest 100 diagonals among them. Columns are single keys; a diagonal takes the
      blocks that it crosses.
    - `block_sparse`: of each row of blocks the `top_k` with the largest products of block means, chosen alike in any
      chunks that begin at multiples of `block_size`.
    - `a_shape`: the blocks that hold one of the first `n_init` keys or, for some query of the row, one of the last
      `n_local`.

    Args:
        kind: pattern of the heads.
        vertical_size, slash_size: single columns and diagonals, no fewer than 30 and 100.
        adaptive_budget: share a of the call's N keys instead: 0.2 a N columns and 0.8 a N diagonals.
        top_k: blocks per row; 50 of 128 hold as many keys as the paper's 100 of 64.
        n_init, n_local: tokens.
        heads: one entry per query head of the layer instead; what an entry leaves out is taken from the above.
    """

    name: ClassVar[str] = "minference"
    summary: ClassVar[str] = "columns and diagonals, pooled blocks, or sinks and a window, per query head"
    source: ClassVar[str] = "MInference 1.0, arXiv 2407.02490, section 3"

    kind: Kind = "vertical_slash"
    vertical_size: int = 1000
    slash_size: int = 6096
    adaptive_budget: float | None = None
    top_k: int = 50
    n_init: int = 128
    n_local: int = 3968
    heads: tuple[MInferenceHead, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.heads, list | tuple):
            raise ValueError(f"minference: heads must be a list with an entry per query head, got {self.heads!r}")
        entries = tuple(self._entry(entry) for entry in self.heads)
        object.__setattr__(self, "heads", entries)
        for entry in (self._default, *entries):
            self._check(entry)

    @property
    def _default(self) -> MInferenceHead:
        return MInferenceHead(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MInferenceHead)})

    def _entry(self, entry: MInferenceHead | Mapping[str, Any]) -> MInferenceHead:
        if isinstance(entry, MInferenceHead):
            return entry
        known = [field.name for field in dataclasses.fields(MInferenceHead)]
        if not isinstance(entry, Mapping) or (unknown := sorted(set(entry) - set(known))):
            given = entry if not isinstance(entry, Mapping) else f"the unknown keys {unknown}"
            raise ValueError(f"minference: an entry of heads is a mapping with keys among {known}, got {given}")
        return dataclasses.replace(self._default, **entry)

    def _check(self, entry: MInferenceHead) -> None:
        if entry.kind not in get_args(Kind):
            raise ValueError(f"minference: kind must be one of {get_args(Kind)}, got {entry.kind!r}")
        for field in dataclasses.fields(entry):
            value = getattr(entry, field.name)
            if field.name == "adaptive_budget":
                if value is not None:
                    require_share(self, value, field.name)
            elif field.name != "kind" and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
                raise ValueError(f"minference: {field.name} must be a positive integer, got {value!r}")

    def check_heads(self, num_heads: int) -> None:
        if self.heads and len(self.heads) != num_heads:
            raise ValueError(
                f"minference: heads holds {len(self.heads)} entries, the layer has {num_heads} query heads; "
                "give one per query head, or none"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "heads": [dataclasses.asdict(entry) for entry in self.heads]}

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, scale: float, q_offset: int, heads: Sequence[int] | None = None
    ) -> BlockSelection:
        num_heads = q.shape[1]
        numbers = range(num_heads) if heads is None else heads
        choices = [self.heads[n] if self.heads else self._default for n in numbers]
        parts = []
        for kind in dict.fromkeys(choice.kind for choice in choices):
            rows = [row for row in range(num_heads) if choices[row].kind == kind]
            call = _Call(
                q=q,
                k=k,
                grid=BlockGrid.of(q, k, self.block_size, q_offset),
                scale=scale,
                rows=rows,
                choices=[choices[row] for row in rows],
            )
            parts.append((_SELECT[kind](call), rows))
        return merge(parts, num_heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One kind's heads: `rows` of the query heads of `q [batch, num_heads, q_len, head_dim]`, and what they chose."""

    q: Tensor
    k: Tensor
    grid: BlockGrid
    scale: float
    rows: list[int]
    choices: list[MInferenceHead]

    def scores(self, score: Callable[..., Any], **options: Any) -> Any:
        """What `score(q, k, ...)` says of these heads: a tensor `[batch, heads, ...]` or several."""
        # Grouped query heads are scored together: those of the KV heads that some of them read.
        group = self.q.shape[1] // self.k.shape[1]
        kv_heads = sorted({row // group for row in self.rows})
        scored = [head * group + n for head in kv_heads for n in range(group)]
        q, k = take_heads(self.q, scored), take_heads(self.k, kv_heads)
        found = score(q, k, scale=self.scale, q_offset=self.grid.q_offset, **options)
        rows = [scored.index(row) for row in self.rows]
        return take_heads(found, rows) if isinstance(found, Tensor) else tuple(take_heads(x, rows) for x in found)

    def per_head(self, values: Sequence[int]) -> Tensor:
        """int32 `[heads]` on the device."""
        return per_head(tuple(values), torch.int32, self.q.device)

    def of_mask(self, marked: Tensor, columns: Tensor | None = None) -> BlockSelection:
        counts, indices = keep_marked(marked, self.grid.first_block)
        return BlockSelection(block_size=self.grid.block_size, counts=counts, indices=indices, columns=columns)


def _vertical_slash(call: _Call) -> BlockSelection:
    length = call.k.shape[2]
    vertical, slash = call.scores(last_q_sums, last_q=NUM_LAST_QUERIES)
    sizes = [choice.sizes(length) for choice in call.choices]
    columns = _largest(vertical, [size for size, _ in sizes], NUM_SINK_COLUMNS, call)
    distances = _largest(slash, [size for _, size in sizes], NUM_NEAR_DIAGONALS, call).long()
    chosen = torch.zeros(*slash.shape[:2], length + 1, dtype=torch.bool, device=slash.device)
    chosen.scatter_(-1, torch.where(distances < 0, length, distances), True)
    blocks = blockwise(chosen[..., :length], call.grid.block_size)
    # A distance within a block's reach crosses two block diagonals, a multiple of its size lies on one.
    diagonals = blocks.any(-1) | torch.nn.functional.pad(blocks[..., :-1, 1:].any(-1), (1, 0))
    return call.of_mask(on_diagonals(diagonals, call.grid), columns)


def _largest(sums: Tensor, sizes: list[int], num_forced: int, call: _Call) -> Tensor:
    """int32 `[batch, heads, largest size]`: the numbers of the largest entries, the first ones forced; -1 for none."""
    sums[..., :num_forced] = float("inf")
    found = sums.topk(max(sizes), -1).indices.to(torch.int32)
    if min(sizes) == max(sizes):
        return found
    rank = torch.arange(max(sizes), device=sums.device)
    return found.masked_fill(rank >= call.per_head(sizes)[:, None], -1)


def _block_sparse(call: _Call) -> BlockSelection:
    scores = call.scores(pooled_block_scores, block_size=call.grid.block_size)
    number = call.per_head([choice.top_k for choice in call.choices])
    counts, indices = select_top_k(scores, number, first_block=call.grid.first_block)
    return BlockSelection(block_size=call.grid.block_size, counts=counts, indices=indices)


def _a_shape(call: _Call) -> BlockSelection:
    size, device = call.grid.block_size, call.q.device
    n_init, n_local = (
        call.per_head([getattr(choice, name) for choice in call.choices])[:, None, None]
        for name in ("n_init", "n_local")
    )
    first = torch.arange(call.grid.num_kv_blocks, device=device) * size
    nearest = block_distances(call.grid, device) * size - (size - 1)
    marked = (first < n_init) | (nearest < n_local)
    return call.of_mask(marked.expand(call.q.shape[0], -1, -1, -1))


_SELECT: dict[str, Callable[[_Call], BlockSelection]] = {
    "vertical_slash": _vertical_slash,
    "block_sparse": _block_sparse,
    "a_shape": _a_shape,
}
