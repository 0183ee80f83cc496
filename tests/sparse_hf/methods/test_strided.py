"""`strided` and `fixed`: the Sparse Transformer's two factorisations, by blocks."""

from collections.abc import Callable

import pytest

from sparse_hf import Fixed, Strided


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 4), (5, 3), (64, 2), (128, 2)])
def test_strided(check: Callable, size: int, stride: int) -> None:
    def reads(i: int, j: int, n: int) -> bool:
        distance = i // size - j // size
        return distance < stride or distance % stride == 0

    check(Strided(block_size=size, stride_blocks=stride), reads, [1, size, min(13 * size + 1, 400)])


@pytest.mark.parametrize(
    ("size", "stride", "summary"), [(3, 1, 1), (3, 4, 1), (5, 3, 2), (3, 4, 4), (64, 2, 1), (128, 2, 1)]
)
def test_fixed(check: Callable, size: int, stride: int, summary: int) -> None:
    def reads(i: int, j: int, n: int) -> bool:
        row, block = i // size, j // size
        return row // stride == block // stride or block % stride >= stride - summary

    method = Fixed(block_size=size, stride_blocks=stride, num_summary_blocks=summary)
    check(method, reads, [1, size, min(13 * size + 1, 400)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Strided(stride_blocks=0), "strided: stride_blocks must be a positive integer"),
        (lambda: Strided(block_size=True), "strided: block_size must be a positive integer"),
        (lambda: Fixed(num_summary_blocks=0), "fixed: num_summary_blocks must be a positive integer"),
        (lambda: Fixed(stride_blocks=2, num_summary_blocks=3), "must not exceed stride_blocks, got 3 and 2"),
    ],
)
def test_wrong_values(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
