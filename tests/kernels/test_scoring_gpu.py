"""The Triton scoring kernels on a GPU, bf16 against plain torch in fp32, lengths that are no multiple of anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels.scoring import (
    gather_columns,
    last_q_sums,
    pooled_block_scores,
    scatter_add_columns,
    select_top_k,
    select_top_p,
    transpose_lists,
    xattention_block_mass,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_empty")]

LENGTH = 4096 + 77


def heads_of(heads: int, length: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[2, heads, length, dim]` with the strides of a projection."""
    return torch.randn(2, length, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)


def listed(lists: tuple[Tensor, Tensor]) -> list[list[int]]:
    counts, indices = (x.cpu() for x in lists)
    rows = indices.flatten(0, -2).tolist()
    return [row[:count] for row, count in zip(rows, counts.flatten().tolist(), strict=True)]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """The naive side multiplies fp32 copies of the inputs; TF32 would hide the kernel's error."""
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("stride", "block_size"), [(16, 128), (8, 128), (4, 128), (16, 64)])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "offset"),
    [(LENGTH, LENGTH, None), (4096, 4096, None), (1024, LENGTH, 2048), (77, LENGTH, None), (1000, 3000, 1999)],
)
def test_block_mass(q_len: int, kv_len: int, offset: int | None, stride: int, block_size: int, dim: int) -> None:
    q, k = heads_of(8, q_len, dim) * 2, heads_of(2, kv_len, dim)
    settings = {"stride": stride, "block_size": block_size, "q_offset": offset}
    expected = xattention_block_mass(q, k, **settings, backend="naive")
    actual = xattention_block_mass(q, k, **settings)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)
    assert torch.equal(actual, xattention_block_mass(q, k, **settings))


def test_block_mass_in_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_hf_kernels.scoring.xattention import launch

    q, k = heads_of(4, 4 * LENGTH, 128), heads_of(2, 4 * LENGTH, 128)
    whole = xattention_block_mass(q, k, stride=4)
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)
    torch.testing.assert_close(xattention_block_mass(q, k, stride=4), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 33, 1000, 8192])
def test_selection(columns: int) -> None:
    rows = min(columns, 20)
    mass = (torch.rand(2, 4, rows, columns, device="cuda") * 64).round() / 64  # ties; exact sums in any order
    share = torch.tensor([0.0, 0.5, 0.9, 1.0], device="cuda")
    expected = select_top_p(mass, share, backend="naive")
    found = select_top_p(mass, share)
    assert listed(found) == listed(expected)
    assert listed(transpose_lists(*found, columns)) == listed(transpose_lists(*expected, columns, backend="naive"))
    for k in (1, 50):
        assert listed(select_top_k(mass - 0.5, k)) == listed(select_top_k(mass - 0.5, k, backend="naive"))


def test_selection_does_not_wait_for_the_device() -> None:
    mass = torch.rand(1, 4, 32, 32, device="cuda")
    transpose_lists(*select_top_p(mass, 0.9), 32)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        transpose_lists(*select_top_p(mass, 0.9), 32)
        select_top_k(mass, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pooled_scores(dim: int) -> None:
    q, k = heads_of(8, 2000, dim) * 8, heads_of(2, LENGTH, dim) * 8
    expected = pooled_block_scores(q, k, backend="naive")
    torch.testing.assert_close(pooled_block_scores(q, k), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("last_q", [1, 64, 128])
def test_last_q_sums(last_q: int, dim: int) -> None:
    q, k = heads_of(8, LENGTH, dim) * 2, heads_of(2, LENGTH, dim)
    expected = last_q_sums(q, k, last_q=last_q, backend="naive")
    found = last_q_sums(q, k, last_q=last_q)
    again = last_q_sums(q, k, last_q=last_q)
    for actual, sums, repeated in zip(found, expected, again, strict=True):
        torch.testing.assert_close(actual, sums, rtol=2e-3, atol=1e-4)
        assert torch.equal(actual, repeated)


@pytest.mark.parametrize("heads", [2, 8])
def test_columns(heads: int) -> None:
    k, v = heads_of(2, LENGTH, 128).requires_grad_(), heads_of(2, LENGTH, 128).requires_grad_()
    chosen = [torch.randperm(LENGTH + 9, device="cuda")[:777] - 4 for _ in range(2 * heads)]
    indices = torch.stack(chosen).view(2, heads, 777).int()
    found = []
    for backend in ("naive", "triton"):
        gathered = gather_columns(k, v, indices, backend=backend)
        grads = torch.autograd.grad(gathered, (k, v), [out.detach() * 3 for out in gathered])
        target = torch.zeros(2, 2, LENGTH, 128, device="cuda")
        found.append((*gathered, *grads, scatter_add_columns(target, gathered[1].detach(), indices, backend=backend)))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(actual, expected)
