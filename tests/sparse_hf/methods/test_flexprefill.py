"""FlexPrefill against its definition in loops, and against the defects of the authors' code."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_hf import FlexPrefill

SIZE, DIM = 64, 8


def inputs(q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(q_len + kv_len)
    return 2 * torch.randn(2, 4, q_len, DIM), 2 * torch.randn(2, 2, kv_len, DIM)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def distance(p: list[float], q: list[float]) -> float:
    """Square root of the Jensen-Shannon divergence."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += sum(x * math.log(x / m) for x in (a, b) if x > 0) / 2
    return math.sqrt(max(total, 0))


def means(x: Tensor, offset: int) -> dict[int, Tensor]:
    """Mean of each block of positions."""
    blocks: dict[int, list[Tensor]] = {}
    for n, row in enumerate(x):
        blocks.setdefault((offset + n) // SIZE, []).append(row)
    return {block: torch.stack(rows).mean(0) for block, rows in blocks.items()}


class Head:
    """One head of one sequence by the definition."""

    def __init__(self, q: Tensor, k: Tensor, offset: int) -> None:
        self.offset, self.length = offset, offset + len(q)
        self.num_blocks = math.ceil(self.length / SIZE)
        self.q_means, self.k_means = means(q, offset), means(k, 0)
        last = q[-SIZE:]
        self.vertical, self.slash = [0.0] * self.length, [0.0] * self.length
        for n, row in enumerate(last):
            i = self.length - len(last) + n
            for j, weight in enumerate(softmax((k[: i + 1] @ row / math.sqrt(DIM)).tolist())):
                self.vertical[j] += weight / len(last)
                self.slash[i - j] += weight / len(last)
        mean = last.mean(0)
        estimate = softmax([float(mean @ self.k_means[b]) / math.sqrt(DIM) for b in range(self.num_blocks)])
        self.distance = distance(estimate, self.blockwise(self.vertical))

    def blockwise(self, shares: list[float]) -> list[float]:
        return [sum(shares[b * SIZE : (b + 1) * SIZE]) for b in range(self.num_blocks)]

    def number(self, shares: list[float], method: FlexPrefill) -> int:
        total, tokens = 0.0, 0
        for share in sorted(shares, reverse=True):
            if total >= method.gamma * sum(shares):
                break
            total, tokens = total + share, tokens + 1
        return self.within(math.ceil(tokens / SIZE), method)

    def within(self, number: int, method: FlexPrefill) -> int:
        number = max(number, math.ceil(method.min_budget / SIZE))
        return number if method.max_budget is None else min(number, math.ceil(method.max_budget / SIZE))

    def largest(self, shares: list[float], method: FlexPrefill) -> set[int]:
        blocks = self.blockwise(shares)
        order = [0, *sorted(range(1, self.num_blocks), key=lambda b: -blocks[b])]
        return set(order[: self.number(shares, method)])

    def vertical_slash(self, method: FlexPrefill) -> list[set[int]]:
        columns, runs = self.largest(self.vertical, method), self.largest(self.slash, method)
        rows = []
        for row in self.q_means:
            kept = {b for b in columns if b <= row} | {0, row}
            for run in runs:
                for d in range(run * SIZE, (run + 1) * SIZE):
                    kept |= {(i - d) // SIZE for i in (row * SIZE, row * SIZE + SIZE - 1) if i - d >= 0}
            rows.append(kept)
        return rows

    def query_aware(self, method: FlexPrefill) -> tuple[list[set[int]], list[list[float]]]:
        rows, scores = [], []
        for row, query in self.q_means.items():
            share = softmax([float(query @ self.k_means[b]) / math.sqrt(DIM) for b in range(row + 1)])
            order = sorted(range(row + 1), key=lambda b: (b not in (0, row), -share[b]))
            number = next(n for n in range(len(order) + 1) if sum(share[b] for b in order[:n]) >= method.gamma - 1e-9)
            rows.append(set(order[: max(self.within(number, method), len({0, row}))]))
            scores.append(share)
        return rows, scores


@pytest.mark.parametrize(
    ("q_len", "offset", "options"),
    [
        (512, 0, {"gamma": 0.5, "min_budget": 64}),
        (470, 0, {"gamma": 0.3, "min_budget": 200, "max_budget": 300}),
        (300, 256, {"gamma": 0.3, "min_budget": 1}),
        (200, 310, {"gamma": 0.6, "min_budget": 100, "max_budget": 130}),
        (40, 400, {"gamma": 0.6, "min_budget": 64}),
    ],
)
def test_definition(selected: Callable, q_len: int, offset: int, options: dict) -> None:
    """Batch 2, grouped heads, chunks; half of the heads on either side of tau."""
    q, k = inputs(q_len, offset + q_len)
    heads = [[Head(q[b, h], k[b, h // 2], offset) for h in range(4)] for b in range(2)]
    distances = sorted(head.distance for line in heads for head in line)
    assert distances[4] - distances[3] > 1e-4
    method = FlexPrefill(tau=(distances[3] + distances[4]) / 2, block_size=SIZE, **options)
    rows, columns = selected(method, q, k, offset)
    assert columns == [[set()] * 4] * 2
    for b in range(2):
        for h, head in enumerate(heads[b]):
            aware = head.distance < method.tau
            expected = head.query_aware(method)[0] if aware else head.vertical_slash(method)
            assert rows[b][h] == expected, (b, h, aware)


def test_tau_zero_makes_every_head_vertical_slash(selected: Callable) -> None:
    q, k = inputs(512, 512)
    method = FlexPrefill(gamma=0.5, tau=0, min_budget=64, block_size=SIZE)
    rows, _ = selected(method, q, k)
    assert rows[1][2] == Head(q[1, 2], k[1, 1], 0).vertical_slash(method)


def test_no_row_of_a_query_aware_head_starves(selected: Callable) -> None:
    """The authors rank the blocks of all rows together, so that some rows are left with what is forced."""
    q, k = inputs(1024, 1024)
    q[:, :, 512:] *= 4  # sharp rows, which win such a ranking
    method = FlexPrefill(gamma=0.8, tau=1.0, min_budget=192, block_size=SIZE)
    rows, _ = selected(method, q, k)
    for b in range(2):
        for h in range(4):
            _, scores = Head(q[b, h], k[b, h // 2], 0).query_aware(method)
            for row, (kept, share) in enumerate(zip(rows[b][h], scores, strict=True)):
                assert sum(share[j] for j in kept) >= 0.8 - 1e-5
                assert len(kept) >= min(3, row + 1), "the budget is one of rows"


@pytest.mark.parametrize(("size", "row", "expected"), [(64, 9, {0, 1, 2, 3, 4, 8, 9}), (128, 4, {0, 1, 2, 3, 4})])
def test_budgets_are_in_blocks_of_the_size_that_was_given(
    selected: Callable, size: int, row: int, expected: set[int]
) -> None:
    """The authors divide by 128 whatever the block size is.

    300 columns hold all attention alike: 267 of them hold 0.89, which are 5 blocks of 64 or 3 of 128. The row is too
    early for the diagonals that the last queries read, the main one apart.
    """
    q, k = torch.zeros(1, 1, 1024, DIM), torch.zeros(1, 1, 1024, DIM)
    q[..., 0], k[:, :, :300, 0] = 10, 10
    rows, _ = selected(FlexPrefill(gamma=0.89, tau=0, min_budget=1, block_size=size), q, k)
    assert rows[0][0][row] == expected


def test_a_run_of_diagonals_takes_both_blocks_that_it_touches(selected: Callable) -> None:
    """Where all attention lies at distance 100, block diagonals 1 and 2 hold it; the authors keep the first."""
    length, far = 512, 100
    k = torch.eye(length)[None, None]
    q = 1000 * k.roll(far, 2)
    method = FlexPrefill(gamma=0.9, tau=0, min_budget=128, max_budget=128, block_size=SIZE)
    rows, _ = selected(method, q, k)
    for row in (5, 6):
        assert {(p - far) // SIZE for p in range(row * SIZE, (row + 1) * SIZE)} == {row - 1, row - 2}
        assert {row - 1, row - 2} <= rows[0][0][row]
    assert 4 not in rows[0][0][7] and len(rows[0][0][7]) < 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": 1.5}, "gamma must lie"),
        ({"tau": -1}, "tau must lie"),
        ({"min_budget": 0}, "min_budget must be a positive integer"),
        ({"min_budget": 512, "max_budget": 256}, "max_budget must not be below min_budget"),
        ({"block_size": 32}, "block_size must be one of"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**values)
