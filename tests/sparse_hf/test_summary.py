"""The summary's counts against brute force over the definitions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_hf import (
    SlidingWindow,
    SparseConfig,
    print_sparsity_summary,
    sparsify,
    sparsity_summary,
)
from sparse_hf_kernels import UNBOUNDED, AttentionLayout, BlockList, HeadPattern

SIZE = 4
BLOCKS = (torch.rand(8, 8, generator=torch.Generator().manual_seed(5)) < 0.5).tril()
BLOCKS[3] = False

PATTERNS = {
    "dense": HeadPattern(),
    "window": HeadPattern(window=5),
    "window of 1": HeadPattern(window=1),
    "streaming": HeadPattern(window=5, num_sink_tokens=3),
    "more sinks than window": HeadPattern(window=2, num_sink_tokens=9),
    "explicit": HeadPattern(blocks=BlockList.from_mask(BLOCKS, SIZE)),
}


def reads(name: str, i: int, j: int) -> bool:
    """Whether a query at i reads a key at j <= i, written from each pattern's name."""
    match name:
        case "dense":
            return True
        case "window":
            return i - j < 5
        case "window of 1":
            return i == j
        case "streaming":
            return i - j < 5 or j < 3
        case "more sinks than window":
            return i - j < 2 or j < 9
    return bool(BLOCKS[i // SIZE, j // SIZE])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("max_distance", [UNBOUNDED, 1, 4, 7])
@pytest.mark.parametrize("num_dense_rows", [0, 1, 10, 100])
def test_row_counts_equal_brute_force(name: str, max_distance: int, num_dense_rows: int) -> None:
    layout = AttentionLayout(patterns=(PATTERNS[name],), max_distance=max_distance, num_dense_rows=num_dense_rows)
    for length in (1, 2, 7, 8, 9, 31, 32):
        expected = [
            sum((reads(name, i, j) or i < num_dense_rows) and i - j < max_distance for j in range(i + 1))
            for i in range(length)
        ]
        counts = layout.row_counts(PATTERNS[name], length)
        assert counts.tolist() == expected
        assert counts.dtype == torch.int64


@pytest.mark.parametrize(("length", "window"), [(1000, 64), (64, 64), (63, 64), (1 << 20, 4096)])
def test_a_causal_window_by_formula(length: int, window: int) -> None:
    pattern = HeadPattern(window=window)
    ramp = min(window, length)
    expected = ramp * (ramp + 1) // 2 + (length - ramp) * window
    assert int(AttentionLayout(patterns=(pattern,)).row_counts(pattern, length).sum()) == expected


def test_an_explicit_pattern_ends() -> None:
    with pytest.raises(ValueError, match="covers 32 tokens, got 33"):
        AttentionLayout(patterns=(PATTERNS["explicit"],)).row_counts(PATTERNS["explicit"], 33)


@pytest.mark.parametrize("length", [1, 9, 40])
def test_density_equals_the_oracle(case: Any, length: int) -> None:
    summary = sparsity_summary(case.model, length)
    causal = length * (length + 1) // 2
    for layer, row in enumerate(summary.layers):
        kept = sum(int(case.mask(layer, head, length).sum()) for head in range(case.num_heads))
        assert row.attention_density == pytest.approx(kept / (causal * case.num_heads), abs=1e-12)
        assert row.dense_kv_bytes == case.num_heads * length * 2 * 16 * 4
        assert 0 < row.kv_bytes <= row.dense_kv_bytes
    assert summary.attention_density == pytest.approx(
        sum(x.attention_density for x in summary.layers) / case.num_layers
    )


def test_totals_and_head_sparsity(make_model: Callable) -> None:
    model = sparsify(
        make_model("llama"), SparseConfig(sparse=SlidingWindow(window_size=6), head_masks=((1, 0), (0, 0)))
    )
    summary = sparsity_summary(model, 100, batch_size=3)
    assert [row.head_sparsity for row in summary.layers] == [0.5, 1.0]
    assert [row.methods for row in summary.layers] == [
        ("dense", "sliding_window"),
        ("sliding_window", "sliding_window"),
    ]
    assert [row.kv_bytes for row in summary.layers] == [3 * (100 + 5) * 128, 3 * (5 + 5) * 128]
    values = summary.to_dict()
    assert values["kv_bytes"] == summary.kv_bytes == 3 * 115 * 128
    assert values["dense_kv_bytes"] == 3 * 400 * 128
    assert values["head_sparsity"] == 0.75
    window = 6 * 7 // 2 + 94 * 6
    assert values["attention_density"] == pytest.approx((5050 + 3 * window) / (4 * 5050))
    assert len(values["layers"]) == 2


def test_wrong_lengths(make_model: Callable) -> None:
    model = sparsify(make_model("llama"), SparseConfig())
    for seq_len, batch_size in ((0, 1), (-1, 1), (5, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            sparsity_summary(model, seq_len, batch_size)


def test_printed(make_case: Callable, capsys: pytest.CaptureFixture) -> None:
    case = make_case("qwen2_native", "mixed")
    summary = print_sparsity_summary(case.model, 60, batch_size=2)
    assert summary == sparsity_summary(case.model, 60, batch_size=2)
    text = capsys.readouterr().out
    for expected in (
        "60 tokens, batch 2",
        "streaming",
        "explicit",
        f"{summary.kv_bytes:,}",
        f"{summary.attention_density:.1%}",
    ):
        assert expected in text
