"""Selections against their definition, key by key: what they keep, and the reference operator over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import (
    AttentionLayout,
    BlockSelection,
    HeadPattern,
    TokenPositions,
    sparse_attention,
    sparse_attention_reference,
)

SELECTED = HeadPattern(selected=True)
PLACES = {  # block size, queries, keys, position of the first query
    "whole": (64, 130, 130, 0),
    "chunk": (64, 64, 192, 128),
    "amid a block": (64, 70, 150, 80),
    "keys after the queries": (128, 40, 300, 140),
    "one": (128, 1, 129, 128),
}


def make(place: str, batch: int = 1, num_heads: int = 2, columns: bool = True) -> BlockSelection:
    """Random lists whose entries beyond the counts are garbage; a tenth of the rows is empty."""
    size, q_len, kv_len, offset = PLACES[place]
    rows, num_kv_blocks = (offset + q_len - 1) // size - offset // size + 1, -(-kv_len // size)
    own = torch.arange(rows)[:, None] + offset // size
    shape = (batch, num_heads, rows, num_kv_blocks)
    mask = (torch.rand(shape) < 0.5) & (torch.arange(num_kv_blocks) <= own) & (torch.rand(*shape[:3], 1) < 0.9)
    where = torch.rand(batch, num_heads, kv_len).argsort(-1)[..., :9].to(torch.int32)
    where[..., 3] = -1
    made = BlockSelection.from_mask(mask, size, where if columns else None)
    listed = torch.arange(num_kv_blocks) < made.counts[..., None]
    return replace(made, indices=torch.where(listed, made.indices, 10**6))


def keeps(selection: BlockSelection, b: int, h: int, i: int, j: int, offset: int) -> bool:
    """Whether the query at position i reads the key at position j, from the words of `BlockSelection`."""
    size = selection.block_size
    row = i // size - offset // size
    blocks = selection.indices[b, h, row, : int(selection.counts[b, h, row])].tolist()
    columns = [] if selection.columns is None else selection.columns[b, h].tolist()
    return j // size in blocks or j in columns


def kept(selection: BlockSelection, rows: range, kv_len: int, offset: int) -> Tensor:
    """Boolean `[batch, num_heads, rows, kv_len]`."""
    batch, num_heads = selection.counts.shape[:2]
    return torch.tensor(
        [
            [
                [[keeps(selection, b, h, i + offset, j, offset) for j in range(kv_len)] for i in rows]
                for h in range(num_heads)
            ]
            for b in range(batch)
        ]
    )


@pytest.mark.parametrize("columns", [False, True], ids=["blocks", "columns"])
@pytest.mark.parametrize("place", PLACES)
def test_keeps(place: str, columns: bool) -> None:
    _, q_len, kv_len, offset = PLACES[place]
    selection = make(place, columns=columns)
    for rows in (slice(0, q_len), slice(q_len // 3, q_len // 2 + 1)):
        found = selection.keeps(rows, offset, kv_len)
        assert torch.equal(found, kept(selection, range(rows.start, rows.stop), kv_len, offset))


def test_from_mask() -> None:
    mask = torch.rand(2, 3, 4, 6) < 0.5
    selection = BlockSelection.from_mask(mask, 64)
    for line in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        count, indices = int(selection.counts[tuple(line)]), selection.indices[tuple(line)].tolist()
        assert indices[:count] == mask[tuple(line)].nonzero().flatten().tolist()
    assert torch.equal(selection.block_mask(6), mask)


def test_select() -> None:
    selection = make("whole", batch=2, num_heads=4)
    for heads in ([0, 1, 2, 3], [2], [3, 0]):
        part = selection.select(heads)
        assert part.num_heads == len(heads) and part.columns is not None and selection.columns is not None
        for name in ("counts", "indices", "columns"):
            assert torch.equal(getattr(part, name), torch.stack([getattr(selection, name)[:, h] for h in heads], 1))


def test_expand() -> None:
    selection = make("chunk")
    assert selection.expand(1) is selection
    wide = selection.expand(3)
    assert selection.columns is not None and wide.columns is not None
    assert all(torch.equal(x, selection.counts[0]) for x in wide.counts)
    assert all(torch.equal(x, selection.indices[0]) for x in wide.indices)
    assert all(torch.equal(x, selection.columns[0]) for x in wide.columns) and len(wide.columns) == 3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_rows", [0, 1, 64, 65, 140, 10**4])
def test_with_dense_rows(num_rows: int, place: str) -> None:
    """Rows of a block that holds a position below `num_rows` read every earlier key, the others what they read."""
    size, q_len, kv_len, offset = PLACES[place]
    selection = make(place)
    found = selection.with_dense_rows(num_rows, offset).keeps(slice(0, q_len), offset, kv_len)
    before = selection.keeps(slice(0, q_len), offset, kv_len)
    for i in range(q_len):
        dense = (i + offset) // size * size < num_rows
        causal = i + offset + 1
        expected = torch.ones(1, 2, causal, dtype=torch.bool) if dense else before[:, :, i, :causal]
        assert torch.equal(found[:, :, i, :causal], expected), f"row {i}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 32}, "block_size"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int32)}, "one more dimension"),
        ({"indices": torch.zeros(1, 2, 4, 3, dtype=torch.int32)}, "one more dimension"),
        ({"columns": torch.zeros(1, 3, 5, dtype=torch.int32)}, "expected columns"),
        ({"columns": torch.zeros(1, 2, dtype=torch.int32)}, "expected columns"),
        ({"counts": torch.zeros(1, 2, 3)}, "must be int32"),
        ({"columns": torch.zeros(1, 2, 5, dtype=torch.int64)}, "must be int32"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    fitting = make("whole")
    assert fitting.counts.shape == (1, 2, 3)
    with pytest.raises(ValueError, match=words):
        replace(fitting, **changes)


def tensors(q_len: int, kv_len: int, num_heads: int = 2) -> list[Tensor]:
    shapes = ((1, num_heads, q_len, 8), (1, 2, kv_len, 8), (1, 2, kv_len, 8))
    return [torch.randn(shape, dtype=torch.float32, requires_grad=True) for shape in shapes]


def test_calls_that_do_not_fit() -> None:
    q, k, v = tensors(130, 130)
    layout, selection = AttentionLayout(patterns=(SELECTED, HeadPattern())), make("whole")

    def refused(words: str, layout: AttentionLayout = layout, **call: Any) -> None:
        with pytest.raises(ValueError, match=words):
            sparse_attention(q, k, v, layout, **call)

    refused("no selection")
    refused("without a head to read it", AttentionLayout.dense(2), selection=selection)
    refused(r"\[1, 2, 3\]", selection=make("chunk"))
    refused(r"\[1, 2, 3\]", selection=make("whole", num_heads=4))
    refused(r"\[1, 2, 3\]", selection=make("whole", batch=2))
    dense = replace(layout, num_dense_rows=70)
    refused(
        r"70 dense rows, the selection 64; give selection.with_dense_rows\(70, 0\)",
        dense,
        selection=selection.with_dense_rows(64, 0),
    )
    past = TokenPositions.causal(130, 130, q_offset=1)
    refused("up to position 130 and 130 keys", selection=selection, positions=past)
    padded = TokenPositions.from_padding_mask(torch.arange(130)[None] >= 5)
    refused("one unpadded sequence", selection=selection, positions=padded)
    refused("one unpadded sequence", selection=selection, cu_seqlens=torch.tensor([0, 60, 130]))
    refused("max_distance 100", replace(layout, max_distance=100), selection=selection)
    assert sparse_attention(q, k, v, layout, selection=selection).shape == q.shape


@pytest.mark.parametrize("columns", [False, True], ids=["blocks", "columns"])
@pytest.mark.parametrize("place", PLACES)
def test_the_reference(place: str, columns: bool) -> None:
    """One softmax over an explicit mask in fp64: a streaming KV head and a selected one, two query heads each."""
    _, q_len, kv_len, offset = PLACES[place]
    layout = AttentionLayout(patterns=(HeadPattern(window=40, num_sink_tokens=3), SELECTED))
    selection = make(place, num_heads=4, columns=columns)
    i, j = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)[None]
    allowed = kept(selection, range(q_len), kv_len, offset)
    allowed[:, :2] = (i - j < 40) | (j < 3)
    allowed &= j <= i
    some = allowed.any(-1, keepdim=True)

    inputs = tensors(q_len, kv_len, num_heads=4)
    where = TokenPositions.causal(q_len, kv_len, q_offset=offset)
    out, lse = sparse_attention_reference(*inputs, layout, positions=where, selection=selection, scale=0.4)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.4
    scores = scores.masked_fill(~allowed & some, float("-inf"))
    expected = torch.where(some, scores.softmax(-1) @ v.repeat_interleave(2, 1), 0.0)
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(lse, torch.where(some[..., 0], scores.logsumexp(-1), float("-inf")).float())
    grad = torch.randn_like(out)
    found, truth = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-5)
