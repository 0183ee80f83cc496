"""What every method has to hold, static ones against a definition in plain Python loops."""

import json
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from sparse_hf import HeadPlace, Method
from sparse_hf.methods import DynamicMethod, method_from_dict
from sparse_hf.methods.base import FIRST_HEAD
from sparse_hf_kernels import AttentionLayout, sparse_attention

Reads = Callable[[int, int, int], bool]
"""(i, j, length): does the query at i read the key at j <= i in a sequence of so many tokens?"""


def brute_mask(reads: Reads, length: int) -> Tensor:
    """Boolean `[length, length]`."""
    return torch.tensor([[j <= i and reads(i, j, length) for j in range(length)] for i in range(length)])


def layout_mask(layout: AttentionLayout, length: int) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return layout.allowed(layout.patterns[0], i, j, length - 1)


def check_static(method: Method, reads: Reads, lengths: Iterable[int], place: HeadPlace, grows: bool) -> None:
    layout = AttentionLayout(patterns=(method.pattern(place),))
    pattern, lengths = layout.patterns[0], list(lengths)
    masks = {length: brute_mask(reads, length) for length in lengths}
    for length, mask in masks.items():
        assert torch.equal(layout_mask(layout, length), mask), f"{length} tokens"
        assert mask.any(1).all(), "a query without key"
        counts = layout.row_counts(pattern, length)
        assert torch.equal(counts, mask.sum(1))
        size = 3
        blocks = torch.nn.functional.pad(mask.long(), (0, -length % size) * 2)
        blocks = blocks.unflatten(0, (-1, size)).unflatten(2, (-1, size)).sum((1, 3))
        assert torch.equal(layout.block_counts(pattern, length, size), blocks)
    longest = max(lengths)
    if grows:  # a longer sequence reads what the shorter one read
        for length, mask in masks.items():
            assert torch.equal(layout_mask(layout, longest)[:length, :length], mask)
    if pattern.blocks is not None:
        rows = -(-longest // pattern.blocks.block_size)
        assert not pattern.blocks.block_mask(rows).triu(1).any(), "a block after the query's own"
        assert pattern.blocks.block_mask(rows).diagonal().all()
    assert_attends(layout, masks[longest])
    values = json.loads(json.dumps(method.to_dict()))
    again = method_from_dict(values)
    assert again == method and hash(again) == hash(method)
    assert again.pattern(place) == pattern and hash(again.pattern(place)) == hash(pattern)


def assert_attends(layout: AttentionLayout, mask: Tensor) -> None:
    """The operator's output equals a softmax over the mask, and so do its gradients."""
    q, k, v = (torch.randn(1, heads, len(mask), 8, requires_grad=True) for heads in (2, 1, 1))
    out = sparse_attention(q, k, v, layout)
    truth = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(truth)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(truth, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def check() -> Callable[..., None]:
    """`check(method, reads, lengths, place=..., grows=True)`: all that a static method promises.

    `grows`: the mask of a longer sequence, cut to a shorter one, is that one's.
    """

    def run(
        method: Method,
        reads: Reads,
        lengths: Iterable[int],
        *,
        place: HeadPlace = FIRST_HEAD,
        grows: bool = True,
    ) -> None:
        check_static(method, reads, lengths, place, grows)

    return run


Selected = tuple[list[list[list[set[int]]]], list[list[set[int]]]]
"""Blocks of each row of blocks and single columns, both by batch row and query head."""


@pytest.fixture
def selected() -> Callable[..., Selected]:
    """`selected(method, q, k, q_offset)`: what a dynamic method chose, once it holds what all of them promise."""

    def run(method: DynamicMethod, q: Tensor, k: Tensor, q_offset: int = 0, **options: object) -> Selected:
        scale = options.pop("scale", q.shape[-1] ** -0.5)
        chosen = method.select(q, k, scale=scale, q_offset=q_offset, **options)
        size = method.block_size
        first, last = q_offset // size, (q_offset + q.shape[2] - 1) // size
        assert chosen.block_size == size and chosen.counts.shape == (*q.shape[:2], last + 1 - first)
        rows = [
            [
                [set(line[:count]) for line, count in zip(lines, counts, strict=True)]
                for lines, counts in zip(lists, heads, strict=True)
            ]
            for lists, heads in zip(chosen.indices.tolist(), chosen.counts.tolist(), strict=True)
        ]
        for heads in rows:
            for head in heads:
                for row, blocks in enumerate(head, first):
                    assert {0, row} <= blocks and max(blocks) == row, "the first block and the diagonal, none after it"
        assert chosen.counts.tolist() == [[[len(x) for x in head] for head in heads] for heads in rows], "repeats"
        columns = [[set() for _ in heads] for heads in rows]
        if chosen.columns is not None:
            columns = [[set(line) - {-1} for line in heads] for heads in chosen.columns.tolist()]
        return rows, columns

    return run
