"""What methods share that look at q and k: masks of blocks, budgets per head, and lists put together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method
from sparse_hf_kernels import BlockSelection, HeadPattern
from sparse_hf_kernels.scoring import select_top_p
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.selection import BLOCK_SIZES

MARKED = 1 - 2.0**-16
"""As `threshold` of `select_top_p` over scores of 0 and 1: every block of 1 (a row has at most 2**13), none of 0."""


@dataclass(frozen=True, kw_only=True)
class DynamicMethod(Method):
    """A method that chooses blocks from q and k of each prefill call.

    Blocks are counted in a sequence's own positions: block b holds [b, b + 1) * block_size. The first block and the one
    on the diagonal are kept in every row, and nothing after the query. A call of a single query is decoding and reads
    every key. The choice has no gradient; attention over what was chosen has.

    Args:
        block_size: 64 or 128 tokens; Hopper's kernels serve 128.
    """

    is_static: ClassVar[bool] = False

    block_size: int = 128

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"{self.name}: block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern(selected=True)

    def check_heads(self, num_heads: int) -> None:
        """Raises ValueError if parameters per head are not those of `num_heads` query heads."""

    @abstractmethod
    def select(
        self, q: Tensor, k: Tensor, *, scale: float, q_offset: int, heads: Sequence[int] | None = None
    ) -> BlockSelection:
        """What the queries read; nothing here waits for the device.

        Args:
            q: `[batch, num_heads, q_len, head_dim]` of the method's own heads, one unpadded sequence per batch row.
            k: `[batch, num_kv_heads, q_offset + q_len, head_dim]`, same dtype.
            scale: factor on the scores.
            q_offset: position of the first query.
            heads: the numbers of these query heads in their layer, for parameters per head; by default from 0 on.
        """


def require_share(method: Method, value: object, field: str) -> None:
    """Raises ValueError unless the value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{method.name}: {field} must lie in [0, 1], got {value!r}")


def picked(values: Sequence[float], heads: Sequence[int] | None, num_heads: int) -> tuple[float, ...]:
    """Of values per query head of a layer those of `heads`."""
    return tuple(values[head] for head in (range(num_heads) if heads is None else heads))


@lru_cache(maxsize=4096)
def per_head(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[num_heads]` on the device; kept, since copying it there would wait for the device in every call."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def keep_marked(marked: Tensor, first_block: int) -> tuple[Tensor, Tensor]:
    """Lists of the blocks of a boolean `[batch, num_heads, num_q_blocks, num_kv_blocks]` mask, as `select_top_p`.

    The first block and the diagonal are added, what lies after it is left out.
    """
    return select_top_p(marked.to(torch.float16), MARKED, first_block=first_block)


def block_distances(grid: BlockGrid, device: torch.device) -> Tensor:
    """Blocks from each KV block to each query block, int64 `[num_q_blocks, num_kv_blocks]`; negative after it."""
    rows = torch.arange(grid.first_block, grid.first_block + grid.num_q_blocks, device=device)
    return rows[:, None] - torch.arange(grid.num_kv_blocks, device=device)


def on_diagonals(diagonals: Tensor, grid: BlockGrid) -> Tensor:
    """Boolean `[..., num_q_blocks, num_kv_blocks]`: blocks at the distances marked in `diagonals [..., num_blocks]`.

    What lies after the diagonal is unspecified.
    """
    return diagonals[..., block_distances(grid, diagonals.device).clamp_min(0)]


def blockwise(x: Tensor, block_size: int) -> Tensor:
    """`[..., length]` as `[..., num_blocks, block_size]`, the last one filled up with 0."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """(first, number) of each run of consecutive integers."""
    found: list[tuple[int, int]] = []
    for head in heads:
        if found and head == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((head, 1))
    return found


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """These heads of x `[batch, heads, ...]`, as a view where they lie in a row; an index would wait for the device."""
    parts = [x.narrow(1, *run) for run in runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def put_heads(x: Tensor, heads: Sequence[int], num_heads: int) -> Tensor:
    """`[batch, num_heads, ...]` of x at these ascending heads and 0 elsewhere."""
    parts, done, end = [], 0, 0
    for begin, number in [*runs(heads), (num_heads, 0)]:
        parts += [x.new_zeros(x.shape[0], begin - end, *x.shape[2:]), x.narrow(1, done, number)]
        done, end = done + number, begin + number
    return torch.cat(parts, 1)


def merge(parts: Sequence[tuple[BlockSelection, Sequence[int]]], num_heads: int) -> BlockSelection:
    """One selection of `num_heads` query heads from those of disjoint heads, which each part names in its order.

    Heads of no part read nothing by it.
    """
    first = parts[0][0]
    if len(parts) == 1 and list(parts[0][1]) == list(range(num_heads)):
        return first
    batch, _, num_rows = first.counts.shape
    capacity = max(part.indices.shape[-1] for part, _ in parts)
    num_columns = max(0 if part.columns is None else part.columns.shape[-1] for part, _ in parts)
    counts = first.counts.new_zeros(batch, num_heads, num_rows)
    indices = first.indices.new_empty(batch, num_heads, num_rows, capacity)
    columns = first.counts.new_full((batch, num_heads, num_columns), -1) if num_columns else None
    for part, heads in parts:
        done = 0
        for begin, number in runs(heads):
            here, there = slice(begin, begin + number), slice(done, done + number)
            counts[:, here] = part.counts[:, there]
            indices[:, here, :, : part.indices.shape[-1]] = part.indices[:, there]
            if columns is not None and part.columns is not None:
                columns[:, here, : part.columns.shape[-1]] = part.columns[:, there]
            done += number
    return BlockSelection(block_size=first.block_size, counts=counts, indices=indices, columns=columns)
