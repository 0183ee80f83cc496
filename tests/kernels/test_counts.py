"""Counts by formula against loops over pairs, causal and not."""

from typing import Any

import pytest
import torch

from sparse_hf_kernels import UNBOUNDED, AttentionLayout, BlockList, HeadPattern
from sparse_hf_kernels.counts import keys_below

SIZE = 4
GENERATOR = torch.Generator().manual_seed(3)
FREE = torch.rand(8, 8, generator=GENERATOR) < 0.4
LOWER = FREE.tril()

PATTERNS: dict[str, Any] = {
    "dense": HeadPattern(),
    "window": HeadPattern(window=5),
    "self": HeadPattern(window=1),
    "streaming": HeadPattern(window=3, num_sink_tokens=4),
    "sinks beyond the window": HeadPattern(window=2, num_sink_tokens=11),
    "last rows": HeadPattern(window=3, num_sink_tokens=2, num_last_tokens=4),
    "blocks": HeadPattern(blocks=BlockList.from_mask(LOWER, SIZE)),
    "free blocks": HeadPattern(blocks=BlockList.from_mask(FREE, SIZE)),
}


def reads(name: str, i: int, j: int, length: int) -> bool:
    """From the names, not from the patterns' code."""
    match name:
        case "dense":
            return True
        case "window":
            return abs(i - j) < 5
        case "self":
            return i == j
        case "streaming":
            return abs(i - j) < 3 or j < 4
        case "sinks beyond the window":
            return abs(i - j) < 2 or j < 11
        case "last rows":
            return i - j < 3 or j < 2 or i >= length - 4
    return bool((LOWER if name == "blocks" else FREE)[i // SIZE, j // SIZE])


def expected_mask(name: str, length: int, causal: bool, max_distance: int) -> torch.Tensor:
    rows = [
        [reads(name, i, j, length) and abs(i - j) < max_distance and (j <= i or not causal) for j in range(length)]
        for i in range(length)
    ]
    return torch.tensor(rows)


CASES = [  # a layout refuses the others
    (name, causal)
    for name in PATTERNS
    for causal in (True, False)
    if (name, causal) not in (("last rows", False), ("free blocks", True))
]


@pytest.mark.parametrize(("name", "causal"), CASES)
@pytest.mark.parametrize("max_distance", [UNBOUNDED, 6, 1])
def test_counts_equal_brute_force(name: str, causal: bool, max_distance: int) -> None:
    pattern = PATTERNS[name]
    layout = AttentionLayout(patterns=(pattern,), causal=causal, max_distance=max_distance)
    for length in (1, 3, 4, 17, 32):
        mask = expected_mask(name, length, causal, max_distance)
        counts = layout.row_counts(pattern, length)
        assert counts.dtype == torch.int64 and torch.equal(counts, mask.sum(1))
        limits = torch.arange(length + 1)
        below = keys_below(layout, pattern, length, torch.arange(length), limits)
        assert torch.equal(below.diff(dim=1), mask.long())
        for size in (1, 3, 8):
            pad = -length % size
            blocks = (
                torch.nn.functional.pad(mask.long(), (0, pad, 0, pad)).unflatten(0, (-1, size)).unflatten(2, (-1, size))
            )
            assert torch.equal(layout.block_counts(pattern, length, size), blocks.sum((1, 3)))


def test_a_bidirectional_window_of_4096_at_131072_tokens() -> None:
    pattern = HeadPattern(window=4097)  # |i - j| <= 4096, clipped at both edges
    layout = AttentionLayout(patterns=(pattern,), causal=False)
    assert int(layout.row_counts(pattern, 131072).sum()) == 1_057_091_584


@pytest.mark.parametrize(("length", "window"), [(1000, 64), (64, 64), (63, 64), (1 << 20, 4096)])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_by_closed_formula(length: int, window: int, causal: bool) -> None:
    pattern = HeadPattern(window=window)
    ramp = min(window, length)
    one_side = ramp * (ramp + 1) // 2 + (length - ramp) * window
    total = int(AttentionLayout(patterns=(pattern,), causal=causal).row_counts(pattern, length).sum())
    assert total == (one_side if causal else 2 * one_side - length)


def test_chunks_of_rows_do_not_change_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [AttentionLayout(patterns=(PATTERNS[name],)) for name in ("streaming", "blocks", "last rows")]
    whole = [(x.row_counts(x.patterns[0], 31), x.block_counts(x.patterns[0], 31, 3)) for x in layouts]
    monkeypatch.setattr("sparse_hf_kernels.counts.MAX_ELEMENTS", 5)
    for layout, (rows, blocks) in zip(layouts, whole, strict=True):
        assert torch.equal(layout.row_counts(layout.patterns[0], 31), rows)
        assert torch.equal(layout.block_counts(layout.patterns[0], 31, 3), blocks)


def test_what_cannot_be_counted() -> None:
    selected = HeadPattern(selected=True)
    with pytest.raises(ValueError, match="depends on q and k"):
        AttentionLayout(patterns=(selected,)).row_counts(selected, 8)
    with pytest.raises(ValueError, match="covers 32 tokens, got 33"):
        AttentionLayout(patterns=(PATTERNS["blocks"],)).row_counts(PATTERNS["blocks"], 33)
