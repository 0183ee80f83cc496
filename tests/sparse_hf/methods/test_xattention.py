"""XAttention against its definition in loops, and against the defects of the authors' code."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_hf import XAttention
from sparse_hf.methods import method_from_dict
from sparse_hf_kernels.scoring import xattention_block_mass

SIZE, DIM = 64, 8


def tile(x: Tensor, number: int, stride: int, begin: int) -> Tensor:
    """Positions [number, number + 1) * stride of x `[length, dim]`, its first row at `begin`; zeros elsewhere."""
    rows = [p - begin for p in range(number * stride, (number + 1) * stride)]
    return torch.stack([x[r] if 0 <= r < len(x) else torch.zeros(x.shape[1]) for r in rows])


def block_mass(q: Tensor, k: Tensor, stride: int, offset: int) -> list[list[float]]:
    """Masses of one head's blocks: a row per block of queries."""
    end = offset + len(q)
    first, num_rows, width = offset // SIZE, math.ceil(end / SIZE), SIZE // stride
    keys = [tile(k, j, stride, 0) for j in range(num_rows * width)]
    mass = [[0.0] * num_rows for _ in range(first, num_rows)]
    for i in range(offset // stride, math.ceil(end / stride)):
        query = tile(q, i, stride, offset).flip(0)
        logits = torch.stack([(query * keys[j]).sum() for j in range(i + 1)]) / (math.sqrt(DIM) * stride)
        for j, weight in enumerate(logits.softmax(0).tolist()):
            mass[i // width - first][j // width] += weight
    return mass


def fewest(mass: list[float], row: int, threshold: float) -> set[int]:
    kept, total = {0, row}, sum(mass[: row + 1])
    for block in sorted(range(row + 1), key=lambda j: -mass[j]):
        if sum(mass[j] for j in kept) >= threshold * total:
            break
        kept.add(block)
    return kept


def inputs(q_len: int, kv_len: int, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(q_len + kv_len)
    return 2 * torch.randn(2, heads[0], q_len, DIM), 2 * torch.randn(2, heads[1], kv_len, DIM)


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize(("q_len", "offset"), [(320, 0), (301, 0), (100, 192), (90, 170)])
def test_definition(selected: Callable, stride: int, q_len: int, offset: int) -> None:
    """Batch 2, grouped heads, a threshold per query head, chunks that begin amid a block."""
    q, k = inputs(q_len, offset + q_len)
    thresholds = (0.2, 0.9, 0.6, 0.4)
    method = XAttention(stride=stride, threshold=thresholds, block_size=SIZE)
    rows, columns = selected(method, q, k, offset)
    assert columns == [[set()] * 4] * 2
    sizes = set()
    for b in range(2):
        for h in range(4):
            mass = block_mass(q[b, h], k[b, h // 2], stride, offset)
            expected = [fewest(line, n, thresholds[h]) for n, line in enumerate(mass, offset // SIZE)]
            assert rows[b][h] == expected, (b, h)
            sizes |= {len(x) for x in expected}
    assert max(sizes) > 3, "nothing was left to choose"


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_sparsity_ratio(selected: Callable, ratio: float) -> None:
    q, k = inputs(640, 640)
    rows, _ = selected(XAttention(sparsity_ratio=ratio, block_size=SIZE), q, k)
    for b in range(2):
        for h in range(4):
            mass = xattention_block_mass(q, k, block_size=SIZE)[b, h].tolist()
            for row, kept in enumerate(rows[b][h]):
                number = max(math.ceil(round((1 - ratio) * (row + 1), 9)), len({0, row}))
                free = sorted(set(range(row + 1)) - {0, row}, key=lambda j: -mass[row][j])
                assert kept == {0, row, *free[: number - len({0, row})]}


def test_thresholds_go_by_the_heads_of_the_layer(selected: Callable) -> None:
    """A method that serves some heads of a layer gets their numbers."""
    q, k = inputs(256, 256)
    method = XAttention(threshold=(0.1, 0.2, 0.3, 0.9, 1.0, 0.0), block_size=SIZE)
    rows, _ = selected(method, q, k, heads=[4, 5, 0, 3])
    assert all(len(kept) == row + 1 for row, kept in enumerate(rows[0][0])), "threshold 1 keeps all"
    assert all(kept == {0, row} for row, kept in enumerate(rows[0][1])), "threshold 0 keeps what is forced"
    alone, _ = selected(XAttention(threshold=0.9, block_size=SIZE), q, k)
    assert rows[1][3] == alone[1][3]


def test_a_full_row_sums_to_the_number_of_its_tiles() -> None:
    q, k = inputs(300, 300)
    for stride in (4, 8, 16):
        sums = xattention_block_mass(q, k, stride=stride, block_size=SIZE).sum(-1)
        torch.testing.assert_close(sums[..., :4], torch.full((2, 4, 4), SIZE / stride))
        torch.testing.assert_close(sums[..., 4], torch.full((2, 4), math.ceil(44 / stride)).float())


@pytest.mark.parametrize("length", [512, 500])
def test_lengths_that_are_multiples_of_a_chunk(selected: Callable, length: int) -> None:
    """The authors' fallback masks all earlier chunks where the padding has length 0 (`-0:` is everything)."""
    q, k = inputs(512, 512)
    q, k = q[:, :, :length], k[:, :, :length]
    mass = xattention_block_mass(q, k, block_size=SIZE)
    assert (mass[:, :, 5, :4] > 0.1).all(), "mass on earlier chunks"
    method = XAttention(threshold=0.5, block_size=SIZE)
    whole, _ = selected(method, q, k)
    for chunk in (64, 128, 256, 512):
        found: list[list] = [[[] for _ in range(4)] for _ in range(2)]
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            rows, _ = selected(method, q[:, :, start:end], k[:, :, :end], start)
            for b in range(2):
                for h in range(4):
                    found[b][h] += rows[b][h]
        assert found == whole, f"chunks of {chunk}"


def test_the_forced_block_is_a_column_and_no_row(selected: Callable) -> None:
    """The authors' keep_sink sets row 0 instead of column 0; `selected` checks that nothing lies after the diagonal."""
    q, k = inputs(256, 256)
    rows, _ = selected(XAttention(threshold=0.0, block_size=SIZE), q, k)
    assert rows[0][0] == [{0}, {0, 1}, {0, 2}, {0, 3}]


def test_scale_reaches_the_scores(selected: Callable) -> None:
    q, k = inputs(320, 320)
    method = XAttention(threshold=0.7, block_size=SIZE)
    assert selected(method, q, k, scale=1.0) == selected(method, q * DIM**0.5, k)
    assert selected(method, q, k, scale=1.0) != selected(method, q, k)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 5}, "stride must be one of"),
        ({"block_size": 96}, "block_size must be one of"),
        ({"threshold": 1.1}, r"threshold must lie in \[0, 1\]"),
        ({"threshold": [0.5, "x"]}, r"threshold must lie in \[0, 1\]"),
        ({"sparsity_ratio": -0.1}, r"sparsity_ratio must lie in \[0, 1\]"),
        ({"treshold": 0.5}, "unknown keys"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from_dict({"method": "xattention", **values})


def test_thresholds_must_be_as_many_as_heads() -> None:
    with pytest.raises(ValueError, match="2 values, the layer has 4 query heads"):
        XAttention(threshold=(0.5, 0.6)).check_heads(4)
