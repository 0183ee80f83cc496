"""MInference against its definition in loops, and against the defects of the authors' code."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_hf import MInference, MInferenceHead
from sparse_hf.methods import method_from_dict

SIZE, DIM = 64, 8


def inputs(q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(q_len + kv_len)
    return 2 * torch.randn(2, 4, q_len, DIM), 2 * torch.randn(2, 2, kv_len, DIM)


def last_sums(q: Tensor, k: Tensor, offset: int) -> tuple[list[float], list[float]]:
    """Columns and diagonals of one head, summed over the last 64 queries."""
    length = offset + len(q)
    vertical, slash = [0.0] * length, [0.0] * length
    for n in range(max(len(q) - 64, 0), len(q)):
        i = offset + n
        for j, weight in enumerate((k[: i + 1] @ q[n] / math.sqrt(DIM)).softmax(0).tolist()):
            vertical[j] += weight
            slash[i - j] += weight
    return vertical, slash


def largest(sums: list[float], number: int, forced: int) -> set[int]:
    """`number` entries, the first `forced` among them."""
    order = sorted(range(len(sums)), key=lambda n: (n >= forced, -sums[n]))
    return set(order[: max(number, forced)])


def vertical_slash(
    q: Tensor, k: Tensor, offset: int, vertical_size: int, slash_size: int
) -> tuple[list[set[int]], set[int]]:
    vertical, slash = last_sums(q, k, offset)
    length = offset + len(q)
    diagonals, rows = largest(slash, slash_size, 100), []
    for row in range(offset // SIZE, math.ceil(length / SIZE)):
        kept = {0, row}
        for d in diagonals:
            kept |= {(i - d) // SIZE for i in range(row * SIZE, (row + 1) * SIZE) if i >= d}
        rows.append(kept)
    return rows, largest(vertical, vertical_size, 30)


def pooled(q: Tensor, k: Tensor, offset: int, top_k: int) -> list[set[int]]:
    rows, length = [], offset + len(q)
    for row in range(offset // SIZE, math.ceil(length / SIZE)):
        mean = q[max(row * SIZE - offset, 0) : (row + 1) * SIZE - offset].mean(0)
        scores = [float(mean @ k[b * SIZE : (b + 1) * SIZE].mean(0)) for b in range(row + 1)]
        order = sorted(range(row + 1), key=lambda b: (b not in (0, row), -scores[b]))
        rows.append(set(order[: max(top_k, len({0, row}))]))
    return rows


def a_shape(q_len: int, offset: int, n_init: int, n_local: int) -> list[set[int]]:
    rows = []
    for row in range(offset // SIZE, math.ceil((offset + q_len) / SIZE)):
        queries = range(row * SIZE, (row + 1) * SIZE)
        read = {j // SIZE for i in queries for j in range(i + 1) if j < n_init or i - j < n_local}
        rows.append(read | {0, row})
    return rows


@pytest.mark.parametrize(("q_len", "offset"), [(512, 0), (450, 0), (256, 256), (300, 130), (30, 400)])
def test_every_kind_in_one_layer(selected: Callable, q_len: int, offset: int) -> None:
    """Batch 2, grouped heads of different kinds and sizes, chunks that begin amid a block."""
    q, k = inputs(q_len, offset + q_len)
    sizes = ((40, 120), None, (75, 101), None)
    heads = (
        MInferenceHead(vertical_size=40, slash_size=120),
        MInferenceHead(kind="block_sparse", top_k=3),
        MInferenceHead(vertical_size=75, slash_size=101),
        MInferenceHead(kind="a_shape", n_init=70, n_local=100),
    )
    rows, columns = selected(MInference(heads=heads, block_size=SIZE), q, k, offset)
    for b in range(2):
        for h in (0, 2):
            expected, single = vertical_slash(q[b, h], k[b, h // 2], offset, *sizes[h])
            assert rows[b][h] == expected and columns[b][h] == single, (b, h)
        assert rows[b][1] == pooled(q[b, 1], k[b, 0], offset, 3)
        assert rows[b][3] == a_shape(q_len, offset, 70, 100)
        assert columns[b][1] == columns[b][3] == set()


def test_one_kind_for_all(selected: Callable) -> None:
    q, k = inputs(512, 512)
    rows, columns = selected(MInference(vertical_size=50, slash_size=110, block_size=SIZE), q, k)
    for b in range(2):
        for h in range(4):
            assert (rows[b][h], columns[b][h]) == vertical_slash(q[b, h], k[b, h // 2], 0, 50, 110)
    assert len({frozenset(line) for heads in columns for line in heads}) == 8, "all heads read the same columns"


def test_heads_go_by_their_numbers_in_the_layer(selected: Callable) -> None:
    q, k = inputs(512, 512)
    entries = [{"kind": "a_shape", "n_local": 64 * n} for n in range(1, 7)]
    rows, _ = selected(MInference(heads=entries, n_init=1, block_size=SIZE), q, k, heads=[4, 5, 0, 1])
    for position, number in enumerate([4, 5, 0, 1]):
        assert rows[0][position] == a_shape(512, 0, 1, 64 * (number + 1))


@pytest.mark.parametrize(("budget", "expected"), [(0.3, (60, 240)), (0.1, (30, 100)), (1.0, (200, 800))])
def test_adaptive_budget(selected: Callable, budget: float, expected: tuple[int, int]) -> None:
    """0.2 a N columns and 0.8 a N diagonals, no fewer than those that are forced."""
    assert MInferenceHead(adaptive_budget=budget).sizes(1000) == expected
    q, k = inputs(512, 512)
    vertical, slash = (max(int(budget * part * 512 + 1e-6), least) for part, least in ((0.2, 30), (0.8, 100)))
    rows, columns = selected(MInference(adaptive_budget=budget, block_size=SIZE), q, k)
    assert (rows[1][3], columns[1][3]) == vertical_slash(q[1, 3], k[1, 1], 0, vertical, slash)
    assert len(columns[1][3]) == vertical


@pytest.mark.parametrize(
    ("far", "expected"), [(192, {0, 4, 5, 6, 7}), (193, {0, 3, 4, 5, 6, 7}), (255, {0, 3, 4, 5, 6, 7})]
)
def test_a_diagonal_keeps_the_blocks_that_it_crosses(selected: Callable, far: int, expected: set[int]) -> None:
    """The nearest 100 and one more, at a distance that all attention has: whole blocks cross in one block diagonal."""
    k = torch.eye(512)[None, None]
    q = 1000 * k.roll(far, 2)
    rows, _ = selected(MInference(slash_size=101, block_size=SIZE), q, k)
    assert rows[0][0][7] == expected


def test_sizes_beyond_the_length_keep_all(selected: Callable) -> None:
    q, k = inputs(200, 200)
    rows, columns = selected(MInference(block_size=SIZE), q, k)
    assert rows[0][0] == [set(range(row + 1)) for row in range(4)] and columns[0][0] == set(range(200))


def test_block_sparse_stays_block_sparse(selected: Callable) -> None:
    """The authors' search rewrites block_sparse and stream_llm to vertical_and_slash (1000, 6096)."""
    entries = [{"kind": kind} for kind in ("block_sparse", "a_shape", "vertical_slash", "block_sparse")]
    method = method_from_dict({"method": "minference", "heads": entries, "top_k": 4, "block_size": SIZE})
    again = method_from_dict(json.loads(json.dumps(method.to_dict())))
    assert isinstance(again, MInference) and again == method and hash(again) == hash(method)
    assert [head.kind for head in again.heads] == [entry["kind"] for entry in entries]
    assert {head.top_k for head in again.heads} == {4}, "what an entry leaves out comes from the method"
    q, k = inputs(512, 512)
    rows, columns = selected(again, q, k)
    assert rows[0][3] == pooled(q[0, 3], k[0, 1], 0, 4) and columns[0][3] == set()


@pytest.mark.parametrize("kind", ["block_sparse", "a_shape"])
def test_chunks_choose_what_the_whole_does(selected: Callable, kind: str) -> None:
    q, k = inputs(450, 450)
    method = MInference(kind=kind, top_k=3, n_init=10, n_local=70, block_size=SIZE)
    whole, _ = selected(method, q, k)
    for chunk in (64, 192):
        found: list[list] = [[[] for _ in range(4)] for _ in range(2)]
        for start in range(0, 450, chunk):
            rows, _ = selected(method, q[:, :, start : start + chunk], k[:, :, : start + chunk], start)
            for b in range(2):
                for h in range(4):
                    found[b][h] += rows[b][h]
        assert found == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vertical_and_slash"}, "kind must be one of"),
        ({"vertical_size": 0}, "vertical_size must be a positive integer"),
        ({"adaptive_budget": 2}, "adaptive_budget must lie"),
        ({"heads": [{"top_k": -1}]}, "top_k must be a positive integer"),
        ({"heads": [{"typ": "a_shape"}]}, r"unknown keys \['typ'\]"),
        ({"heads": ["a_shape"]}, "an entry of heads is a mapping"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MInference(**values)


def test_entries_must_be_as_many_as_heads() -> None:
    with pytest.raises(ValueError, match="2 entries, the layer has 4 query heads"):
        MInference(heads=(MInferenceHead(), MInferenceHead())).check_heads(4)
