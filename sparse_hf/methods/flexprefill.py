"""`flexprefill`: per head either what each block of queries asks for, or the columns and diagonals of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf.methods.base import require_positive
from sparse_hf.methods.dynamic import MARKED, DynamicMethod, blockwise, keep_marked, on_diagonals, require_share
from sparse_hf_kernels import BlockSelection
from sparse_hf_kernels.scoring import last_q_sums, mean_pool, pooled_block_scores, select_top_k, select_top_p
from sparse_hf_kernels.scoring.geometry import BlockGrid


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(DynamicMethod):
    """A pattern per query head and call, by how well pooled keys predict what the last queries read.

    The last `min(block_size, q_len)` queries of the call stand for all: chunked prefill estimates in each chunk anew.
    Their exact attention gives each column and each diagonal its share. Let p be the shares of the column blocks and e
    the softmax over the products of the queries' mean and the keys' block means. Where sqrt(JSD(e, p)) < tau (natural
    logarithm), the head is query-aware, elsewhere vertical-slash.

    Query-aware: each row of blocks keeps the fewest that hold `gamma` of its softmax over products of block means.
    Vertical-slash: the fewest columns that hold `gamma`, counted in tokens and rounded up to blocks, are so many column
    blocks, the largest; likewise diagonals, a run of `block_size` of which takes both block diagonals that it touches.

    Args:
        gamma: share of the attention to cover.
        tau: distance below which a head is query-aware; 0 makes all heads vertical-slash.
        min_budget, max_budget: tokens, rounded up to blocks, between which the number of blocks is kept: of each
            query-aware row, and of the columns and the diagonals of a vertical-slash head. None for no maximum.
    """

    name: ClassVar[str] = "flexprefill"
    summary: ClassVar[str] = "query-aware blocks, or columns and diagonals, that hold `gamma` of the attention"
    source: ClassVar[str] = "FlexPrefill, arXiv 2502.20766, section 4"

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, self.gamma, "gamma")
        require_share(self, self.tau, "tau")
        require_positive(self, "min_budget")
        if self.max_budget is not None:
            require_positive(self, "max_budget")
            if self.max_budget < self.min_budget:
                raise ValueError(
                    f"flexprefill: max_budget must not be below min_budget, got {self.max_budget} < {self.min_budget}"
                )

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, scale: float, q_offset: int, heads: Sequence[int] | None = None
    ) -> BlockSelection:
        grid = BlockGrid.of(q, k, self.block_size, q_offset)
        number = min(self.block_size, grid.q_len)
        sums = last_q_sums(q, k, last_q=self.block_size, scale=scale, q_offset=q_offset)
        vertical, slash = (x / number for x in sums)
        marked = self._vertical_slash(vertical, slash, grid)
        if self.tau == 0:
            counts, indices = keep_marked(marked, grid.first_block)
        else:
            aware = self._is_query_aware(q[:, :, grid.q_len - number :], k, vertical, scale)
            pooled = pooled_block_scores(q, k, block_size=self.block_size, scale=scale, q_offset=q_offset)
            scores = torch.where(aware[..., None, None], pooled, marked.float())
            counts, indices = self._keep(scores, aware, grid)
        return BlockSelection(block_size=self.block_size, counts=counts, indices=indices)

    @property
    def _min_blocks(self) -> int:
        return -(-self.min_budget // self.block_size)

    @property
    def _max_blocks(self) -> int | None:
        return None if self.max_budget is None else -(-self.max_budget // self.block_size)

    def _vertical_slash(self, vertical: Tensor, slash: Tensor, grid: BlockGrid) -> Tensor:
        """Boolean `[batch, num_heads, num_q_blocks, num_kv_blocks]` from the shares `[batch, num_heads, kv_len]`."""
        columns, diagonals = (self._largest(x) for x in (vertical, slash))
        # Distances [o, o + 1) * block_size reach from block diagonal o into the next.
        diagonals = diagonals | torch.nn.functional.pad(diagonals[..., :-1], (1, 0))
        return columns[:, :, None] | on_diagonals(diagonals, grid)

    def _largest(self, shares: Tensor) -> Tensor:
        """Boolean `[batch, num_heads, num_blocks]`: so many blocks as the fewest tokens that hold gamma fill."""
        ranked = shares.sort(-1, descending=True).values.double()
        before = ranked.cumsum(-1) - ranked
        tokens = (before < self.gamma * ranked.sum(-1, keepdim=True)).sum(-1)
        number = (tokens + self.block_size - 1) // self.block_size
        number = number.clamp(self._min_blocks, self._max_blocks)
        blocks = blockwise(shares, self.block_size).sum(-1)
        blocks[..., 0] = float("inf")  # the first column block, the main diagonal
        rank = blocks.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return rank < number[..., None]

    def _is_query_aware(self, q: Tensor, k: Tensor, vertical: Tensor, scale: float) -> Tensor:
        """Boolean `[batch, num_heads]`; q are the last queries."""
        keys = mean_pool(k, self.block_size)
        mean = q.float().mean(2).unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, D]
        estimate = (mean @ keys.transpose(-1, -2) * scale).softmax(-1).flatten(1, 2)
        exact = blockwise(vertical, self.block_size).sum(-1)
        return jensen_shannon_distance(estimate, exact) < self.tau

    def _keep(self, scores: Tensor, aware: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """Counts and indices; scores are softmax rows in query-aware heads, 0 and 1 in the others."""
        # Each row of the batch has thresholds of its own: rows become heads.
        flat, aware = scores.flatten(0, 1)[None], aware.flatten()
        share = torch.where(aware, self.gamma, MARKED)
        counts, indices = select_top_p(flat, share, first_block=grid.first_block)
        # Both choices rank alike, so that one holds the other.
        if self._min_blocks > 1:
            least = select_top_k(flat, torch.where(aware, self._min_blocks, 0), first_block=grid.first_block)
            counts, indices = _pick(least[0] > counts, least, (counts, indices))
        if self._max_blocks is not None and self._max_blocks < grid.num_kv_blocks:
            limit = torch.where(aware, self._max_blocks, grid.num_kv_blocks)
            most = select_top_k(flat, limit, first_block=grid.first_block)
            counts, indices = _pick(most[0] < counts, most, (counts, indices))
        shape = scores.shape[:2]
        return counts[0].unflatten(0, shape), indices[0].unflatten(0, shape)


def jensen_shannon_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, natural logarithm, of distributions along the last dimension."""
    entropy = torch.special.entr
    divergence = entropy((p + q) / 2).sum(-1) - (entropy(p).sum(-1) + entropy(q).sum(-1)) / 2
    return divergence.clamp_min(0).sqrt()


def _pick(where: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per row the list of `a` or of `b`."""
    return torch.where(where, a[0], b[0]), torch.where(where[..., None], a[1], b[1])
