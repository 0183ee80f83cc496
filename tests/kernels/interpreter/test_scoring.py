"""The Triton scoring kernels in Triton's interpreter against plain torch in fp32."""

from __future__ import annotations

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
from sparse_hf_kernels.scoring.geometry import BlockGrid
from sparse_hf_kernels.scoring.xattention import launch
from sparse_hf_kernels.scoring.xattention.tuning import ScoreConfig

# A block whose weight underflows has the logarithm -inf on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.usefixtures("poison_empty"),
]

DTYPES = (torch.float32, torch.float16)
POINTER = ScoreConfig(block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=2)
TMA = ScoreConfig(block_m=16, block_n=64, block_k=16, num_warps=4, num_stages=2, tma=True)
TMA_COLUMNS = ScoreConfig(block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=2, tma=True, columns=2)

SHAPES = [  # stride, block_size, batch, heads, kv heads, q_len, kv_len, head_dim, q_offset
    (16, 128, 2, 2, 1, 300, 300, 32, None),
    (8, 64, 1, 4, 2, 200, 333, 24, None),
    (4, 64, 1, 1, 1, 130, 130, 64, None),
    (16, 64, 1, 2, 2, 100, 400, 16, 64),
    (16, 128, 1, 1, 1, 256, 700, 32, 128),
    (8, 128, 1, 1, 1, 90, 200, 16, 21),
    (16, 64, 1, 1, 1, 3, 3, 16, None),
]


def heads_of(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[batch, heads, length, dim]` with the strides of a projection."""
    return torch.randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def listed(lists: tuple[Tensor, Tensor]) -> list[list[int]]:
    counts, indices = lists
    rows = indices.flatten(0, -2).tolist()
    return [row[:count] for row, count in zip(rows, counts.flatten().tolist(), strict=True)]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """fp16 products are exact in fp32: only the order of the additions differs."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_mass(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stride, block, batch, heads, kv_heads, q_len, kv_len, dim, offset = shape
    q, k = heads_of(batch, heads, q_len, dim, dtype), heads_of(batch, kv_heads, kv_len, dim, dtype)
    settings = {"stride": stride, "block_size": block, "q_offset": offset}
    expected = xattention_block_mass(q, k, **settings, backend="naive")
    close(xattention_block_mass(q, k, **settings, backend="triton"), expected, dtype)


@pytest.mark.parametrize("limit", [1, 2**29], ids=["chunks", "whole"])
@pytest.mark.parametrize("tma", [None, TMA, TMA_COLUMNS], ids=["pointer", "tma", "tma columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_mass_over_many_tiles(
    shape: tuple[int, ...], tma: ScoreConfig | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stride, block, batch, heads, kv_heads, q_len, kv_len, dim, offset = shape
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", limit)
    q, k = heads_of(batch, heads, q_len, dim), heads_of(batch, kv_heads, kv_len, dim)
    grid = BlockGrid.of(q, k, block, offset)
    expected = xattention_block_mass(q, k, stride=stride, block_size=block, q_offset=offset, scale=0.2, backend="naive")
    close(launch.block_mass_triton(q, k, grid, stride, 0.2, (POINTER, tma)), expected)


@pytest.mark.parametrize("tma", [None, TMA_COLUMNS], ids=["pointer", "tma"])
def test_block_mass_over_several_strips(tma: ScoreConfig | None) -> None:
    """A folded pair of strips and one in the middle: 325 rows in strips of 128."""
    q, k = heads_of(1, 1, 1300, 16), heads_of(1, 1, 1300, 16)
    grid = BlockGrid.of(q, k, 64, None)
    expected = xattention_block_mass(q, k, stride=4, block_size=64, backend="naive")
    close(launch.block_mass_triton(q, k, grid, 4, 0.25, (POINTER, tma)), expected)


@pytest.mark.parametrize("num_rows", [1, 17, 128, 129, 300, 640, 1000])
@pytest.mark.parametrize("row0", [0, 5, 200])
@pytest.mark.parametrize("config", [POINTER, TMA, TMA_COLUMNS], ids=["pointer", "tma", "tma columns"])
def test_every_causal_tile_has_one_program(config: ScoreConfig, row0: int, num_rows: int) -> None:
    """The folding of the triangle, as `_place` does it."""
    strip, num_strips, cols0, programs = launch._triangle(row0, num_rows, config)
    extra = strip * config.block_m // (config.block_n * config.columns)
    per_pair = strip * (2 * cols0 + (num_strips - 1) * extra)
    found = []
    for program in range(programs):
        pair, rest = divmod(program, per_pair)
        col, line = divmod(rest, strip)
        high = num_strips - 1 - pair
        high_cols = cols0 + high * extra
        place, col = (pair, col - high_cols) if col >= high_cols else (high, col)
        found.append((place * strip + line, col))
    assert len(set(found)) == len(found)
    rows = -(-num_rows // config.block_m)
    needed = {
        (row, col)
        for row in range(rows)
        for col in range((row0 + (row + 1) * config.block_m - 1) // (config.block_n * config.columns) + 1)
    }
    assert needed <= set(found)


def test_misaligned_heads_take_the_pointer_kernel() -> None:
    q = torch.randn(1, 70, 2, 18)[..., :17].transpose(1, 2)
    assert launch.tile_descriptor(q, 8, 16, 16) is None
    k = heads_of(1, 1, 70, 17)
    grid = BlockGrid.of(q, k, 64, None)
    expected = xattention_block_mass(q, k, stride=8, block_size=64, scale=0.2, backend="naive")
    close(launch.block_mass_triton(q, k, grid, 8, 0.2, (POINTER, TMA)), expected)


def test_block_mass_with_one_dominant_block() -> None:
    q, k = heads_of(1, 1, 300, 16), heads_of(1, 1, 300, 16)
    k[:, :, 64:128] += 50 * q.mean()
    q[:, :, 128:] = 300.0  # logits in the thousands: exp2 of them underflows or overflows without a maximum
    expected = xattention_block_mass(q, k, stride=8, block_size=64, backend="naive")
    actual = xattention_block_mass(q, k, stride=8, block_size=64, backend="triton")
    assert actual.isfinite().all()
    close(actual, expected)


def test_columns_must_lie_together() -> None:
    q = heads_of(1, 1, 64, 16)
    with pytest.raises(ValueError, match=r"call k.contiguous\(\) first"):
        xattention_block_mass(q, q.transpose(2, 3).contiguous().transpose(2, 3), backend="triton")


def masses() -> Tensor:
    mass = torch.rand(2, 2, 3, 19) ** 3
    mass[0, 0] = 0.25  # ties everywhere
    mass[0, 1] = torch.eye(19)[2]  # one block holds everything
    mass[1, 0, 1] = 0.0  # a row without mass
    return mass


@pytest.mark.parametrize("forced", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0, "per head"])
def test_top_p(threshold: float | str, forced: tuple[bool, bool]) -> None:
    share = torch.tensor([0.4, 0.95]) if isinstance(threshold, str) else threshold
    settings = {"keep_sink": forced[0], "keep_diagonal": forced[1]}
    mass = masses()
    for first_block in (0, 16):
        expected = select_top_p(mass, share, first_block=first_block, **settings, backend="naive")
        found = select_top_p(mass, share, first_block=first_block, **settings, backend="triton")
        assert listed(found) == listed(expected)
        assert found[1].shape == mass.shape and found[0].dtype == found[1].dtype == torch.int32


@pytest.mark.parametrize("k", [0, 1, 4, 100])
def test_top_k(k: int) -> None:
    scores = torch.randn(1, 2, 3, 19).mul(2).round()  # ties, both signs, -0
    for sink, own in ((True, True), (False, False)):
        expected = select_top_k(scores, k, keep_sink=sink, keep_diagonal=own, backend="naive")
        assert listed(select_top_k(scores, k, keep_sink=sink, keep_diagonal=own, backend="triton")) == listed(expected)
    per_head = torch.tensor([2, 7])
    found = select_top_k(scores, per_head, backend="triton")
    assert listed(found) == listed(select_top_k(scores, per_head, backend="naive"))


def test_selection_reads_strided_scores_and_ignores_the_future() -> None:
    mass = torch.rand(2, 6, 3, 40).transpose(1, 2)[..., 3:22]
    poisoned = mass.clone()
    poisoned[..., torch.arange(19) > torch.arange(6)[:, None] + 13] = float("nan")
    expected = listed(select_top_p(mass, 0.8, backend="naive"))
    assert listed(select_top_p(mass, 0.8, backend="triton")) == expected
    assert listed(select_top_p(poisoned, 0.8, backend="triton")) == expected


@pytest.mark.parametrize(("num_rows", "num_cols"), [(1, 1), (5, 40), (70, 33)])
def test_transposed_lists(num_rows: int, num_cols: int) -> None:
    mask = torch.rand(2, 2, num_rows, num_cols) < 0.3
    counts = mask.sum(-1, dtype=torch.int32)
    indices = mask.int().argsort(dim=-1, descending=True, stable=True).int()
    indices[torch.arange(num_cols) >= counts[..., None]] = 2**30  # not to be read
    found = transpose_lists(counts, indices, num_cols, backend="triton")
    assert listed(found) == listed(transpose_lists(counts, indices, num_cols, backend="naive"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block_size", "heads", "kv_heads", "q_len", "kv_len", "dim", "offset"),
    [(16, 4, 2, 100, 100, 24, None), (32, 2, 2, 37, 133, 64, 50), (64, 2, 1, 5, 5, 16, None)],
)
def test_pooled_scores(
    block_size: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    dim: int,
    offset: int | None,
    dtype: torch.dtype,
) -> None:
    q, k = heads_of(2, heads, q_len, dim, dtype), heads_of(2, kv_heads, kv_len, dim, dtype)
    close(mean_pool(q, block_size, offset=7, backend="triton"), mean_pool(q, block_size, offset=7, backend="naive"))
    expected = pooled_block_scores(q, k, block_size=block_size, q_offset=offset, backend="naive")
    close(pooled_block_scores(q, k, block_size=block_size, q_offset=offset, backend="triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last_q", [1, 5, 64, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "kv_len", "dim", "offset"),
    [(4, 2, 100, 100, 24, None), (2, 2, 37, 133, 64, 50), (1, 1, 40, 2100, 16, None), (1, 1, 1, 1, 16, None)],
)
def test_last_q_sums(
    heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, offset: int | None, last_q: int, dtype: torch.dtype
) -> None:
    q, k = heads_of(1, heads, q_len, dim, dtype), heads_of(1, kv_heads, kv_len, dim, dtype)
    expected = last_q_sums(q, k, last_q=last_q, q_offset=offset, backend="naive")
    for actual, sums in zip(last_q_sums(q, k, last_q=last_q, q_offset=offset, backend="triton"), expected, strict=True):
        close(actual, sums, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 4])
def test_columns(heads: int, dtype: torch.dtype) -> None:
    k = heads_of(2, 2, 40, 24, dtype).requires_grad_()
    v = torch.randn(2, 2, 40, 24, dtype=dtype).requires_grad_()
    indices = torch.stack([torch.randperm(50)[:37] - 5 for _ in range(2 * heads)]).view(2, heads, 37).int()
    found = []
    for backend in ("naive", "triton"):
        gathered = gather_columns(k, v, indices, backend=backend)
        loss = sum((out.float().sin() * 2).sum() for out in gathered)
        target = scatter_add_columns(k.detach().clone(), gathered[0].detach(), indices, backend=backend)
        found.append((*gathered, *torch.autograd.grad(loss, (k, v)), target))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)
