"""`dilated`: doubling offsets, and LongNet's segments with rates."""

from collections.abc import Callable

import pytest

from sparse_hf import Dilated, HeadPlace
from sparse_hf_kernels import AttentionLayout

OFFSETS = {0, 1, 2, 4, 8, 16, 32, 64}


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (1, 2), (6, 1)])
def test_doubling_offsets(check: Callable, window: int, sinks: int) -> None:
    size = 3
    method = Dilated(block_size=size, num_window_blocks=window, num_sink_blocks=sinks)

    def reads(i: int, j: int, n: int) -> bool:
        row, block = i // size, j // size
        return row - block in OFFSETS or row - block < window or block < sinks

    check(method, reads, [1, 3, 4, 50, 80])


@pytest.mark.parametrize("size", [64, 128])
def test_block_sizes_of_the_kernels(check: Callable, size: int) -> None:
    check(Dilated(block_size=size), lambda i, j, n: i // size - j // size in OFFSETS, [size, 4 * size + 5])


def longnet_pairs(segments: list[int], rates: list[int], head: int, num_blocks: int) -> set[tuple[int, int]]:
    """LongNet's definition: of each segment, every r-th block from the head's phase on; these read each other."""
    pairs = set()
    for segment, rate in zip(segments, rates, strict=True):
        for start in range(0, num_blocks, segment):
            taken = range(start + head % rate, min(start + segment, num_blocks), rate)
            pairs |= {(i, j) for i in taken for j in taken if j <= i}
    return pairs


@pytest.mark.parametrize("head", [0, 1, 2, 5])
@pytest.mark.parametrize(("segments", "rates"), [((4, 8, 16), (1, 2, 4)), ((5, 12), (2, 3)), ((3,), (1,))])
def test_longnet(check: Callable, segments: tuple[int, ...], rates: tuple[int, ...], head: int) -> None:
    size, lengths = 3, [1, 3, 20, 70]
    method = Dilated(block_size=size, num_sink_blocks=1, segments=segments, rates=rates)
    pairs = longnet_pairs(list(segments), list(rates), head, 24)

    def reads(i: int, j: int, n: int) -> bool:
        row, block = i // size, j // size
        return (row, block) in pairs or row == block or block == 0  # window of one block, one sink

    check(method, reads, lengths, place=HeadPlace(kv_head=head))


def test_longnets_geometric_sequences() -> None:
    method = Dilated.longnet()
    assert [64 * blocks for blocks in method.segments] == [2048, 4096, 8192, 16384, 32768]
    assert method.rates == (1, 2, 4, 8, 16)
    assert Dilated.longnet(num_levels=3, first_segment=2, growth=3, block_size=128) == Dilated(
        block_size=128, segments=(2, 6, 18), rates=(1, 3, 9)
    )
    with pytest.raises(ValueError, match="growth >= 2"):
        Dilated.longnet(growth=1)


def test_cost_grows_with_the_logarithm() -> None:
    pattern = Dilated().pattern()
    layout = AttentionLayout(patterns=(pattern,))
    # The last block of a power of two of them reads itself and log2 offsets.
    for blocks in (16, 256):
        assert int(layout.row_counts(pattern, 64 * blocks)[-1]) == 64 * blocks.bit_length()
    sparse = Dilated(block_size=128, num_window_blocks=1).pattern()
    n = 131072
    density = int(AttentionLayout(patterns=(sparse,)).row_counts(sparse, n).sum()) / (n * (n + 1) / 2)
    assert 0.01 < density < 0.02  # 98 to 99% sparse


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segments": (4, 8), "rates": (1,)}, "go in pairs"),
        ({"segments": (4, 4), "rates": (1, 2)}, "must rise"),
        ({"segments": (4, 8), "rates": (1, 9)}, "no rate exceed"),
        ({"segments": (0,), "rates": (1,)}, "positive integers"),
        ({"segments": (2.0,), "rates": (1,)}, "positive integers"),
        ({"num_window_blocks": 0}, "num_window_blocks must be a positive"),
        ({"num_sink_blocks": -1}, "num_sink_blocks must be an integer >= 0"),
    ],
)
def test_wrong_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dilated(**values)
