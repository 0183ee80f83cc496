"""`local_global`: groups of heads, windows that grow with the tokens before a block, evenly spaced blocks."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from sparse_hf import HeadPlace, LocalGlobal
from sparse_hf.retention import retention_groups
from sparse_hf_kernels import AttentionLayout


def window_tokens(method: LocalGlobal, length: int) -> float:
    """base * sqrt(length / base), clamped."""
    base = method.window_size
    return min(max(base * math.sqrt(length / base), method.min_window_size), method.max_window_size)


def definition(method: LocalGlobal, is_global: bool) -> Callable[[int, int, int], bool]:
    size, ratio = method.block_size, Fraction(str(method.global_ratio)).limit_denominator(1024)
    spaced = {math.ceil(m / ratio) for m in range(1000)}

    def reads(i: int, j: int, n: int) -> bool:
        row, block = i // size, j // size
        num_blocks = math.ceil(window_tokens(method, (row + 1) * size) / size)
        return row - block < num_blocks or (is_global and block in spaced)

    return reads


@pytest.mark.parametrize("head", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "values",
    [
        {"window_size": 8, "min_window_size": 2, "max_window_size": 24},
        {"window_size": 5, "min_window_size": 9, "max_window_size": 9, "global_ratio": 0.3},
        {"window_size": 100, "min_window_size": 1, "max_window_size": 16, "global_ratio": 1},
        {"window_size": 3, "min_window_size": 1, "max_window_size": 1000, "global_ratio": 1 / 3},
    ],
)
def test_definition(check: Callable, values: dict, head: int) -> None:
    method = LocalGlobal(block_size=3, **values)
    check(method, definition(method, head % 3 == 2), [1, 3, 31, 90], place=HeadPlace(kv_head=head))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("head", [0, 2])
def test_block_sizes_of_the_kernels(check: Callable, size: int, head: int) -> None:
    method = LocalGlobal(block_size=size, window_size=64, global_ratio=0.5)
    check(method, definition(method, head == 2), [1, 400], place=HeadPlace(kv_head=head))


def test_defaults() -> None:
    """2 local heads for each global one; 128 tokens at 128, 512 from 2048 on; every tenth block."""
    method = LocalGlobal()
    blocks = [method.pattern(HeadPlace(kv_head=head)).blocks for head in range(8)]
    assert [rule.num_global for rule in blocks] == [0, 0, 1, 0, 0, 1, 0, 0]
    for length, expected in ((64, 2), (128, 2), (256, 3), (512, 4), (2048, 8), (65536, 8)):
        row = torch.tensor(length // 64 - 1)
        kept = blocks[0].keeps(row, torch.arange(int(row) + 1))
        assert int(kept.sum()) == min(expected, int(row) + 1)
    row = torch.tensor(200)
    kept = blocks[2].keeps(row, torch.arange(193)).nonzero().flatten()
    assert kept.tolist() == list(range(0, 193, 10))


def test_local_heads_free_their_cache() -> None:
    method = LocalGlobal(block_size=4, window_size=8, min_window_size=2, max_window_size=10, num_local_heads=1)
    layout = AttentionLayout(patterns=tuple(method.pattern(HeadPlace(kv_head=head)) for head in range(2)))
    (local, _), (everything, _) = retention_groups(layout)
    assert everything.recent is None
    # What a next query can read at most, over all lengths: from the oldest block of its window to its predecessor.
    mask = layout.allowed(layout.patterns[0], torch.arange(100)[:, None], torch.arange(100)[None])
    oldest = max(i - int(mask[i].nonzero()[0]) for i in range(100))
    assert local.recent == oldest == 11


def test_recommended() -> None:
    short, long = LocalGlobal.recommended(2048), LocalGlobal.recommended(1_000_000, "large")
    assert short == LocalGlobal()
    assert long.max_window_size > short.max_window_size and long.global_ratio < short.global_ratio
    assert (long.num_local_heads, long.num_global_heads) == (3, 1)
    lengths = (4096, 4097, 32768, 131072, 10**7)
    windows = [LocalGlobal.recommended(length, "small").window_size for length in lengths]
    assert windows == sorted(windows) and len(set(windows)) == 4
    for length, size in ((0, "small"), (4096, "huge")):
        with pytest.raises(ValueError, match="positive seq_len and one of"):
            LocalGlobal.recommended(length, size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_ratio": 0}, "global_ratio must lie in"),
        ({"global_ratio": 1.5}, "global_ratio must lie in"),
        ({"global_ratio": float("nan")}, "global_ratio must lie in"),
        ({"global_ratio": "half"}, "global_ratio must be a number"),
        ({"min_window_size": 600}, "must not exceed max_window_size, got 600 and 512"),
        ({"num_global_heads": 0}, "num_global_heads must be a positive integer"),
        ({"window_size": 0}, "window_size must be a positive integer"),
    ],
)
def test_wrong_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"local_global: .*{message}"):
        LocalGlobal(**values)
