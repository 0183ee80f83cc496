"""Selections on the fused backends on a GPU, with and without single columns, against dense softmaxes over a mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockSelection, HeadPattern, TokenPositions, sparse_attention
from sparse_hf_kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.gpu

EPS = 1e-3
NAMES = ("out", "dq", "dk", "dv")
SELECTED = HeadPattern(selected=True)
ALL = AttentionLayout(patterns=(SELECTED, SELECTED))
MIXED = AttentionLayout(patterns=(HeadPattern(window=300, num_sink_tokens=70), SELECTED))


@pytest.fixture(params=["gluon", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on each fused backend that this GPU has."""
    if request.param == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("gluon serves compute capability 9.0 alone")
    monkeypatch.setenv("SPARSE_HF_BACKEND", request.param)
    return request.param


def make_inputs(
    where: TokenPositions, dim: int = 128, dtype: torch.dtype = torch.bfloat16, batch: int = 1, group: int = 2
) -> list[Tensor]:
    """q, k, v with the strides of a projection; two KV heads."""
    lengths = ((2 * group, where.q_len), (2, where.kv_len), (2, where.kv_len))
    made = [torch.randn(batch, n, heads, dim, device="cuda").to(dtype) for heads, n in lengths]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def selection_of(
    where: TokenPositions, size: int, num_columns: int, batch: int = 1, num_heads: int = 4
) -> BlockSelection:
    """A tenth of the earlier blocks, the own one as a rule; a tenth of the columns is -1, some lie in listed blocks."""
    assert where.offset is not None
    first, last = where.offset // size, (where.offset + where.q_len - 1) // size
    own, blocks = torch.arange(first, last + 1)[:, None], torch.arange(-(-where.kv_len // size))
    mask = torch.rand(batch, num_heads, len(own), len(blocks)) < 0.1
    mask = (mask | ((blocks == own) & (torch.rand(len(own), 1) < 0.9))) & (blocks <= own)
    columns = torch.rand(batch, num_heads, where.kv_len).argsort(-1)[..., :num_columns].to(torch.int32)
    columns = columns.masked_fill(torch.rand(columns.shape) < 0.1, -1).cuda()
    return BlockSelection.from_mask(mask.cuda(), size, columns if num_columns else None)


def allowed_pairs(layout: AttentionLayout, where: TokenPositions, selection: BlockSelection, rows: Tensor) -> Tensor:
    """Boolean `[batch, num_heads, len(rows), kv_len]`: what these queries read."""
    assert where.offset is not None
    size, kv_len, group = selection.block_size, where.kv_len, selection.num_heads // layout.num_kv_heads
    i, j = (rows + where.offset)[:, None], torch.arange(kv_len, device="cuda")
    blocks = selection.block_mask(-(-kv_len // size))[:, :, i[:, 0] // size - where.offset // size]
    keep = blocks.repeat_interleave(size, -1)[..., :kv_len]
    if selection.columns is not None:
        for b, h in torch.cartesian_prod(*map(torch.arange, keep.shape[:2])).tolist():
            columns = selection.columns[b, h]
            keep[b, h][:, columns[columns >= 0].long()] = True
    for head, pattern in enumerate(layout.patterns):
        if not pattern.selected:
            keep[:, head * group : (head + 1) * group] = pattern.keeps(i, j)
    return keep & (j <= i)


def naive(inputs: list[Tensor], allowed: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Copies of the inputs in `dtype`, output and log-sum-exp by one softmax over a mask, all in `dtype`."""
    q, k, v = copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
    group, some = q.shape[1] // k.shape[1], allowed.any(-1, keepdim=True)
    scores = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed & some, float("-inf"))
    out = torch.where(some, scores.softmax(-1) @ v.repeat_interleave(group, 1), 0.0)
    return copies, out, torch.where(some[..., 0], scores.logsumexp(-1), float("-inf"))


def check(
    inputs: list[Tensor], layout: AttentionLayout, where: TokenPositions, selection: BlockSelection,
    deterministic: bool = False,
) -> None:  # fmt: skip
    """Output, log-sum-exp and the gradients of q, k and v through both."""
    dtype = inputs[0].dtype
    out, lse = sparse_attention(
        *inputs, layout, positions=where, selection=selection, return_lse=True, deterministic=deterministic
    )
    grad_out, grad_lse = torch.randn(out.shape, device="cuda").to(dtype), torch.randn(lse.shape, device="cuda")
    found = {"kernel": (out.detach(), *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse)))}
    allowed = allowed_pairs(layout, where, selection, torch.arange(where.q_len, device="cuda"))
    for what, precision in (("truth", torch.float32), ("same", dtype)):
        copies, other, other_lse = naive(inputs, allowed, precision)
        if what == "truth":
            assert torch.equal(lse.isinf(), other_lse.isinf()), "rows without key"
            torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=2e-3)
        total = (other * grad_out.to(precision)).sum()
        total = total + (other_lse * grad_lse.to(precision))[other_lse.isfinite()].sum()
        found[what] = (other.detach(), *torch.autograd.grad(total, copies))
    for n, name in enumerate(NAMES):
        assert_close_to_truth(*(found[x][n] for x in ("kernel", "same", "truth")), eps=EPS, name=name)


PLACES = {  # queries, keys, position of the first query
    "prefill": (4200, 4200, 0),
    "chunk": (1000, 4328, 3328),
    "amid a block": (700, 4321, 3621),
    "keys after the queries": (900, 4200, 2000),
    "decode": (1, 4200, 4199),
}


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("num_columns", [0, 300])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dim", [64, 128])
def test_selections(dim: int, place: str, num_columns: int) -> None:
    q_len, kv_len, offset = PLACES[place]
    where = TokenPositions.causal(q_len, kv_len, "cuda", q_offset=offset)
    for layout in (ALL, MIXED):
        check(make_inputs(where, dim), layout, where, selection_of(where, 128, num_columns))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("dim", "dtype"), [(256, torch.bfloat16), (128, torch.float16), (80, torch.bfloat16)])
def test_dims_and_dtypes(dim: int, dtype: torch.dtype, backend: str) -> None:
    if dim == 80 and backend == "gluon":
        pytest.skip("gluon serves head_dim 64, 128, 256")
    where = TokenPositions.causal(1500, 1500, "cuda")
    check(make_inputs(where, dim, dtype), MIXED, where, selection_of(where, 128, 100))


@pytest.mark.usefixtures("poison_empty")
def test_batch_groups_and_determinism() -> None:
    where = TokenPositions.causal(1100, 1300, "cuda")
    for group in (1, 4):
        inputs = make_inputs(where, batch=2, group=group)
        selection = selection_of(where, 128, 200, batch=2, num_heads=2 * group)
        check(inputs, ALL, where, selection, deterministic=True)


@pytest.mark.usefixtures("poison_empty")
def test_blocks_of_64(backend: str) -> None:
    if backend == "gluon":
        pytest.skip("gluon serves selections of blocks of 128")
    where = TokenPositions.causal(1000, 4200, "cuda")
    for num_columns in (0, 300):
        check(make_inputs(where), MIXED, where, selection_of(where, 64, num_columns))


def test_50_repeats_give_the_same_bits() -> None:
    where = TokenPositions.causal(4200, 4200, "cuda")
    inputs, selection = make_inputs(where, group=4), selection_of(where, 128, 1000, num_heads=8)
    grad, first = torch.randn_like(inputs[0]), None
    for repeat in range(50):
        out, lse = sparse_attention(*inputs, ALL, selection=selection, return_lse=True, deterministic=True)
        found = (out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), f"repeat {repeat}"


def test_32k_tokens_and_1000_columns_on_samples() -> None:
    """Rows of the output and of dq, keys of dk and dv, from their definitions in fp32."""
    length, dim = 32768, 128
    where = TokenPositions.causal(length, length, "cuda")
    inputs, selection = make_inputs(where, group=1), selection_of(where, 128, 1000, num_heads=2)
    assert selection.columns is not None
    out, lse = sparse_attention(*inputs, ALL, selection=selection, return_lse=True)
    grad, scale = torch.randn_like(out), dim**-0.5
    grads = torch.autograd.grad(out, inputs, grad)
    every = torch.arange(length, device="cuda")
    for head in range(2):
        some = torch.cat([torch.tensor([0, 127, 128, length - 1]), torch.randint(length, (28,))]).cuda()
        some = torch.cat([some, selection.columns[0, head, :32].clamp_min(0).long()])
        q, k, v, do, o = (x[0, head].detach().float() for x in (*inputs, grad, out))
        allowed = allowed_pairs(ALL, where, selection, some)[0, head]
        scores = (q[some] @ k.T * scale).masked_fill(~allowed, float("-inf"))
        assert torch.equal(lse[0, head, some].isinf(), ~allowed.any(-1))
        weights = scores.softmax(-1).nan_to_num()  # rows without key
        torch.testing.assert_close(lse[0, head, some], scores.logsumexp(-1), rtol=1e-4, atol=1e-3)
        delta = (do * o).sum(-1)
        d_scores = weights * (do[some] @ v.T - delta[some, None]) * scale
        expected = {"out": weights @ v, "dq": d_scores @ k}
        # Weights of the sampled keys in all rows, by the log-sum-exp that was just found right.
        columns = [allowed_pairs(ALL, where, selection, rows)[0, head][:, some] for rows in every.split(2048)]
        weights = (q @ k[some].T * scale - lse[0, head, :, None]).exp().masked_fill(~torch.cat(columns), 0)
        d_scores = weights * (do @ v[some].T - delta[:, None]) * scale
        expected["dk"], expected["dv"] = d_scores.T @ q, weights.T @ do
        for name, tensor in zip(NAMES, (out, *grads), strict=True):
            error = (tensor[0, head, some].float() - expected[name]).norm() / expected[name].norm()
            assert error < 1e-2, f"{name} of head {head}: {error:.1e}"


def test_columns_need_no_wait() -> None:
    """After a first call, whatever the columns are."""
    from sparse_hf_kernels.backends import problem_of
    from sparse_hf_kernels.sparse_attention.columns.launch import ColumnLists, add_column_gradients, add_columns

    where = TokenPositions.causal(1000, 1000, "cuda")
    inputs = [x.detach() for x in make_inputs(where)]
    selection = selection_of(where, 128, 100)
    assert selection.columns is not None
    problem = replace(problem_of(inputs[0], MIXED, where, 0.1, True), selection=selection)
    out, lse = torch.zeros_like(inputs[0]), torch.full((1, 4, 1000), float("-inf"), device="cuda")
    grads = (torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2]))
    for mode in (0, "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            lists = ColumnLists.of(selection.columns, selection, problem)
            add_columns(*inputs, out, lse, problem, lists)
            add_column_gradients((*inputs, out, lse, torch.zeros_like(lse)), grads, problem, lists)
        finally:
            torch.cuda.set_sync_debug_mode(0)
