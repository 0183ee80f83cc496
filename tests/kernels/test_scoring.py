"""The scoring operators in plain torch against their definitions, written out in float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels.scoring import (
    gather_columns,
    last_q_sums,
    mean_pool,
    pooled_block_scores,
    scatter_add_columns,
    select_top_k,
    select_top_p,
    transpose_lists,
    xattention_block_mass,
)

Lists = list[list[int]]


def heads_of(batch: int, heads: int, length: int, dim: int) -> Tensor:
    """`[batch, heads, length, dim]` with the strides of a projection."""
    return torch.randn(batch, length, heads, dim).transpose(1, 2)


def listed(counts: Tensor, indices: Tensor) -> Lists:
    """The lists of all rows, batch and heads in order."""
    rows = indices.flatten(0, -2).tolist()
    return [row[:count] for row, count in zip(rows, counts.flatten().tolist(), strict=True)]


def token(x: Tensor, position: int, offset: int) -> Tensor:
    """float64 `[D]`, zeros where `x [length, D]` holds nothing."""
    inside = 0 <= position - offset < len(x)
    return x[position - offset].double() if inside else torch.zeros(x.shape[1], dtype=torch.float64)


def antidiagonal_mass(q: Tensor, k: Tensor, stride: int, block: int, scale: float, offset: int) -> Tensor:
    """Of one head: `q [q_len, D]`, `k [kv_len, D]`."""
    first_block = offset // block
    num_q = -(-(offset + len(q)) // block) - first_block
    mass = torch.zeros(num_q, -(-len(k) // block), dtype=torch.float64)
    for i in range(offset // stride, -(-(offset + len(q)) // stride)):
        logits = []
        for j in range(i + 1):
            pairs = ((i * stride + stride - 1 - r, j * stride + r) for r in range(stride))
            logits.append(sum(token(q, a, offset).dot(token(k, b, 0)).item() for a, b in pairs) * scale / stride)
        for j, weight in enumerate(torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()):
            mass[i * stride // block - first_block, j * stride // block] += weight
    return mass


@pytest.mark.parametrize(
    ("stride", "block_size", "q_len", "kv_len", "offset"),
    [
        (16, 128, 160, 160, None),
        (16, 64, 150, 150, None),
        (8, 64, 70, 133, None),
        (4, 64, 67, 67, None),
        (8, 64, 40, 140, 69),
        (16, 64, 3, 3, None),
    ],
)
def test_block_mass_is_its_definition(
    stride: int, block_size: int, q_len: int, kv_len: int, offset: int | None
) -> None:
    q, k = heads_of(1, 2, q_len, 4) * 3, heads_of(1, 1, kv_len, 4)
    mass = xattention_block_mass(q, k, stride=stride, block_size=block_size, q_offset=offset)
    begin = kv_len - q_len if offset is None else offset
    for head in range(2):
        expected = antidiagonal_mass(q[0, head], k[0, 0], stride, block_size, 0.5, begin)
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass[0, head].double(), expected, rtol=1e-4, atol=1e-5)
    diagonal = torch.arange(mass.shape[2])[:, None] + begin // block_size
    assert not mass[..., torch.arange(mass.shape[3]) > diagonal].any()


def test_chunks_give_the_rows_of_the_whole() -> None:
    q, k = heads_of(2, 4, 300, 8), heads_of(2, 2, 300, 8)
    whole = xattention_block_mass(q, k, stride=8, block_size=64)
    for begin, end in ((0, 128), (128, 192), (192, 300)):
        part = xattention_block_mass(q[:, :, begin:end], k[:, :, :end], stride=8, block_size=64)
        expected = whole[:, :, begin // 64 : -(-end // 64), : part.shape[3]]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.sum(-1)[0, 0], torch.tensor([8.0, 8.0, 8.0, 8.0, 6.0]))


def smallest_set(row: list[float], diagonal: int, threshold: float, sink: bool, own: bool) -> list[int]:
    forced = {0} if sink else set()
    forced |= {diagonal} if own else set()
    ranked = sorted(range(diagonal + 1), key=lambda j: (j not in forced, -row[j], j))
    target, kept, mass = threshold * math.fsum(row[: diagonal + 1]), set(forced), math.fsum(row[j] for j in forced)
    for j in ranked[len(forced) :]:
        if mass >= target and threshold < 1:
            break
        kept.add(j)
        mass += row[j]
    return sorted(kept)


@pytest.mark.parametrize("forced", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95, 1.0])
def test_top_p_keeps_the_smallest_set(threshold: float, forced: tuple[bool, bool]) -> None:
    mass = torch.rand(2, 2, 5, 9) ** 4
    mass[0, 0] = 0.25  # ties
    mass[0, 1] = torch.eye(9)[2]  # one block holds everything
    sink, own = forced
    counts, indices = select_top_p(mass, threshold, keep_sink=sink, keep_diagonal=own)
    assert counts.dtype == indices.dtype == torch.int32 and indices.shape == mass.shape
    rows = mass.flatten(0, 2).tolist()
    expected = [smallest_set(row, 4 + i % 5, threshold, sink, own) for i, row in enumerate(rows)]
    assert listed(counts, indices) == expected


def test_top_p_takes_a_threshold_per_head() -> None:
    mass = torch.rand(1, 3, 4, 4)
    counts, indices = select_top_p(mass, torch.tensor([0.0, 0.6, 1.0]))
    for head, threshold in enumerate((0.0, 0.6, 1.0)):
        alone = select_top_p(mass[:, head : head + 1], threshold)
        assert listed(counts[:, head], indices[:, head]) == listed(*alone)


def test_top_k_counts_forced_blocks() -> None:
    scores = torch.randn(2, 2, 4, 7)
    counts, indices = select_top_k(scores, 3, first_block=1)
    for (row, kept), i in zip(
        zip(scores.flatten(0, 2).tolist(), listed(counts, indices), strict=True), range(16), strict=True
    ):
        diagonal = 1 + i % 4
        ranked = sorted(range(diagonal + 1), key=lambda j: (j not in (0, diagonal), -row[j]))
        assert kept == sorted(ranked[:3])
    assert listed(*select_top_k(scores, 0, first_block=1))[:2] == [[0, 1], [0, 2]]
    assert listed(*select_top_k(scores, 99, keep_sink=False, keep_diagonal=False))[3] == list(range(7))


def test_transposed_lists() -> None:
    mask = torch.rand(2, 2, 5, 8) < 0.4
    counts = mask.sum(-1, dtype=torch.int32)
    indices = torch.full((2, 2, 5, 9), 10**6, dtype=torch.int32)  # what lies after the counts is not read
    for place in mask.sum(-1).nonzero().tolist():
        kept = mask[tuple(place)].nonzero()[:, 0].int()
        indices[tuple(place)][: len(kept)] = kept
    expected = [column.nonzero()[:, 0].tolist() for column in mask.transpose(-1, -2).flatten(0, 2)]
    assert listed(*transpose_lists(counts, indices, 8)) == expected


def test_pooled_scores_are_their_definition() -> None:
    q, k = heads_of(1, 2, 50, 6), heads_of(1, 1, 75, 6)
    scores = pooled_block_scores(q, k, block_size=16, scale=0.7)  # queries at 25..74: blocks 1 to 4
    for head in range(2):
        means = [k[0, 0, b : b + 16].double().mean(0) for b in range(0, 75, 16)]
        for row in range(4):
            begin, end = max(16 * (row + 1) - 25, 0), min(16 * (row + 2) - 25, 50)
            query = q[0, head, begin:end].double().mean(0)
            expected = torch.stack([query.dot(mean) * 0.7 for mean in means[: row + 2]]).softmax(0)
            torch.testing.assert_close(scores[0, head, row, : row + 2].double(), expected, rtol=1e-5, atol=1e-6)
            assert not scores[0, head, row, row + 2 :].any()


def test_mean_pool_counts_present_tokens() -> None:
    pooled = mean_pool(torch.ones(1, 1, 9, 3, dtype=torch.float16), 4, offset=3)
    assert pooled.shape == (1, 1, 3, 3) and pooled.dtype == torch.float32
    assert (pooled == 1).all()


@pytest.mark.parametrize(
    ("q_len", "kv_len", "last_q", "offset"), [(20, 20, 8, None), (5, 23, 64, None), (9, 30, 4, 11)]
)
def test_last_q_sums_are_their_definition(q_len: int, kv_len: int, last_q: int, offset: int | None) -> None:
    q, k = heads_of(1, 2, q_len, 6), heads_of(1, 1, kv_len, 6)
    vertical, slash = last_q_sums(q, k, last_q=last_q, scale=0.9, q_offset=offset)
    begin = kv_len - q_len if offset is None else offset
    for head in range(2):
        columns = torch.zeros(kv_len, dtype=torch.float64)
        diagonals = torch.zeros(kv_len, dtype=torch.float64)
        for row in range(max(q_len - last_q, 0), q_len):
            keys = k[0, 0, : begin + row + 1].double()
            for j, weight in enumerate((keys @ q[0, head, row].double() * 0.9).softmax(0)):
                columns[j] += weight
                diagonals[begin + row - j] += weight
        torch.testing.assert_close(vertical[0, head].double(), columns, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slash[0, head].double(), diagonals, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4])
def test_gathered_columns_and_their_gradients(heads: int) -> None:
    k, v = heads_of(2, 2, 12, 4).double().requires_grad_(), torch.randn(2, 2, 12, 4).double().requires_grad_()
    indices = torch.stack([torch.randperm(15)[:9] - 1 for _ in range(2 * heads)]).view(2, heads, 9).int()  # -1, 12, 13
    gathered = gather_columns(k, v, indices)
    for out, source in zip(gathered, (k, v), strict=True):
        for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(heads), torch.arange(9)).tolist():
            j = int(indices[b, h, c])
            expected = source[b, h * 2 // heads, j] if 0 <= j < 12 else torch.zeros(4)
            assert (out[b, h, c] == expected).all()
    grads = torch.autograd.grad(sum((out * out).sum() for out in gathered), (k, v))
    for grad, source in zip(grads, (k, v), strict=True):
        copies = torch.zeros(2, 2, 12, 1)
        for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(heads), torch.arange(9)).tolist():
            if 0 <= (j := int(indices[b, h, c])) < 12:
                copies[b, h * 2 // heads, j] += 1
        torch.testing.assert_close(grad, 2 * source.detach() * copies, rtol=1e-6, atol=1e-6)  # summed in fp32


def test_scatter_adds_in_place() -> None:
    target = torch.ones(1, 1, 4, 2)
    indices = torch.tensor([[[3, -1], [3, 0]]], dtype=torch.int32)
    assert scatter_add_columns(target, torch.ones(1, 2, 2, 2), indices) is target
    assert target[0, 0, :, 0].tolist() == [2.0, 1.0, 1.0, 3.0]


def _attention_inputs() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 8, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: xattention_block_mass(q, k, stride=5), "stride must be one of"),
        (lambda q, k: xattention_block_mass(q, k, block_size=96), "block_size one of"),
        (lambda q, k: xattention_block_mass(q, k, scale=0.0), "scale must be positive"),
        (lambda q, k: xattention_block_mass(q, k[:, :, :4]), "queries must lie among the keys"),
        (lambda q, k: xattention_block_mass(q, k, q_offset=1), "queries must lie among the keys"),
        (lambda q, k: xattention_block_mass(q, k.half()), "equal dtypes"),
        (lambda q, k: xattention_block_mass(q, k, backend="cuda"), "backend must be"),
        (lambda q, k: last_q_sums(q, k, last_q=129), "last_q must lie in"),
        (lambda q, k: pooled_block_scores(q, k, block_size=96), "power of two"),
        (lambda q, k: select_top_p(torch.zeros(1, 2, 4, 4), 1.5), "threshold must lie in"),
        (lambda q, k: select_top_p(q, 0.5), "query blocks must lie among"),
        (lambda q, k: select_top_p(torch.zeros(1, 2, 4, 4), torch.ones(3)), "threshold must be a number"),
        (lambda q, k: select_top_k(torch.zeros(1, 2, 4, 4), -1), "k must not be negative"),
        (lambda q, k: gather_columns(q, k, torch.zeros(1, 2, 3, dtype=torch.int32)), "k and v must agree"),
        (lambda q, k: gather_columns(k, k, torch.zeros(1, 2, 3)), "int32 indices"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*_attention_inputs())
