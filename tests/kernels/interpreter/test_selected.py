"""Selections on the Triton kernels in Triton's interpreter: blocks, and single columns besides them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import (
    AttentionLayout,
    BlockSelection,
    HeadPattern,
    TokenPositions,
    sparse_attention,
    sparse_attention_reference,
)
from sparse_hf_kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poison_empty")

NAMES = ("out", "lse", "dq", "dk", "dv")
SELECTED = HeadPattern(selected=True)
STREAMING = HeadPattern(window=70, num_sink_tokens=3)
ALL = AttentionLayout(patterns=(SELECTED, SELECTED))
MIXED = AttentionLayout(patterns=(STREAMING, SELECTED))
SCALE = 0.3

Inputs = tuple[Tensor, Tensor, Tensor]


def block_mask(where: TokenPositions, size: int, batch: int, num_heads: int, density: float = 0.4) -> Tensor:
    """A random causal one, whose row of query blocks begins with that of the first query."""
    assert where.offset is not None
    first, last = where.offset // size, (where.offset + where.q_len - 1) // size
    mask = torch.rand(batch, num_heads, last - first + 1, -(-where.kv_len // size)) < density
    return mask & (torch.arange(mask.shape[-1]) <= torch.arange(first, last + 1)[:, None])


def random_columns(kv_len: int, batch: int, num_heads: int, number: int = 20) -> Tensor:
    """In no order, anywhere among the keys (in listed blocks and after the queries too), a fifth of them -1."""
    columns = torch.rand(batch, num_heads, kv_len).argsort(-1)[..., :number].to(torch.int32)
    return columns.masked_fill(torch.rand(columns.shape) < 0.2, -1)


def tensors(
    where: TokenPositions, batch: int = 1, num_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> Inputs:
    """q, k, v as a model has them: views of `[batch, length, heads, head_dim]`; two KV heads."""
    lengths = ((num_heads, where.q_len), (2, where.kv_len), (2, where.kv_len))
    q, k, v = (torch.randn(batch, n, h, head_dim).to(dtype).transpose(1, 2).requires_grad_() for h, n in lengths)
    return q, k, v


def results(out: Tensor, lse: Tensor, inputs: Inputs, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and the gradients of q, k, v through both."""
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, grads)


def run(
    inputs: Inputs,
    layout: AttentionLayout,
    where: TokenPositions,
    selection: BlockSelection,
    grads: tuple[Tensor, Tensor],
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    out, lse = sparse_attention(
        *inputs, layout, positions=where, selection=selection, scale=SCALE, return_lse=True,
        deterministic=deterministic,
    )  # fmt: skip
    return results(out, lse, inputs, grads)


def check(
    inputs: Inputs, layout: AttentionLayout, where: TokenPositions, selection: BlockSelection, eps: float = 1e-5
) -> tuple[Tensor, ...]:
    """The kernels' results, after comparing them with the reference's in fp32."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out, lse = sparse_attention_reference(*exact, layout, positions=where, selection=selection, scale=SCALE)
    grad_out = torch.randn(out.shape).to(inputs[0].dtype)
    # A log-sum-exp of -inf is a constant, whatever its gradient.
    grad_lse = torch.randn(lse.shape).masked_fill(lse.isinf(), float("nan"))
    truth = results(out, lse, (exact[0], exact[1], exact[2]), (grad_out.float(), grad_lse.nan_to_num()))
    found = run(inputs, layout, where, selection, (grad_out, grad_lse))
    for name, x, y in zip(NAMES, found, truth, strict=True):
        assert x.shape == y.shape and x.dtype == (torch.float32 if name == "lse" else inputs[0].dtype)
        assert torch.equal(x.isinf(), y.isinf()), f"{name}: rows without key"
        x, y = x.masked_fill(x.isinf(), 0), y.masked_fill(y.isinf(), 0)
        assert_close_to_truth(x, y, y, eps=eps, name=name)
    return found


PLACES = {  # of the queries: size of the blocks, lengths and offset
    "whole": (64, TokenPositions.causal(129, 129)),
    "whole, 128": (128, TokenPositions.causal(140, 140)),
    "keys after the queries": (64, TokenPositions.causal(64, 230, q_offset=64)),
    "amid a block": (64, TokenPositions.causal(50, 150)),
    "amid a block, 128": (128, TokenPositions.causal(40, 200)),
    "one": (64, TokenPositions.causal(1, 100)),
}


@pytest.mark.parametrize("with_columns", [False, True], ids=["blocks", "columns"])
@pytest.mark.parametrize("place", PLACES)
def test_selections(place: str, with_columns: bool) -> None:
    size, where = PLACES[place]
    layout = MIXED if with_columns == (size == 64) else ALL
    columns = random_columns(where.kv_len, 1, 2, where.kv_len // 4) if with_columns else None
    check(tensors(where), layout, where, BlockSelection.from_mask(block_mask(where, size, 1, 2), size, columns))


@pytest.mark.parametrize("layout", [ALL, MIXED], ids=["all", "mixed"])
def test_batch_groups_and_half_precision(layout: AttentionLayout) -> None:
    where = TokenPositions.causal(20, 90)
    selection = BlockSelection.from_mask(block_mask(where, 64, 2, 4), 64, random_columns(90, 2, 4))
    check(tensors(where, 2, 4, 24, torch.float16), layout, where, selection, eps=1.5e-3)


def test_rows_that_read_columns_alone_or_nothing() -> None:
    """No block in one head, no column before row 30 in either; the other head has the blocks but no column."""
    where = TokenPositions.causal(100, 100)
    mask = block_mask(where, 64, 1, 2, density=1.0)
    mask[:, 0] = False
    columns = torch.full((1, 2, 4), -1, dtype=torch.int32)
    columns[0, 0] = torch.tensor([70, -1, 30, 71])
    selection = BlockSelection.from_mask(mask, 64, columns)
    out, lse, dq, _, _ = check(tensors(where), ALL, where, selection)
    assert bool(lse[0, 0, :30].isinf().all()) and bool((out[0, 0, :30] == 0).all()) and bool((dq[0, 0, :30] == 0).all())
    assert bool(lse[0, 0, 30:].isfinite().all())


def test_columns_in_listed_blocks_change_nothing() -> None:
    """Else keys would count twice: every row lists the blocks of all these columns."""
    where = TokenPositions.causal(100, 100)
    mask = block_mask(where, 64, 1, 2, density=1.0)
    inputs, grads = tensors(where), (torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100))
    blocks = BlockSelection.from_mask(mask, 64)
    plain = run(inputs, ALL, where, blocks, grads)
    both = run(inputs, ALL, where, replace(blocks, columns=random_columns(100, 1, 2)), grads)
    for name, x, y in zip(NAMES, both, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_other_heads_are_left_alone() -> None:
    """Heads of another pattern, whose columns mean nothing, and heads without column: the bits of the blocks alone."""
    where = TokenPositions.causal(70, 70)
    blocks = BlockSelection.from_mask(block_mask(where, 64, 1, 4), 64)
    columns = random_columns(70, 1, 4)
    columns[:, :2] = torch.randint(-(2**31), 2**31 - 1, (20,)).to(torch.int32)
    columns[:, 2] = -1
    inputs, grads = tensors(where, num_heads=4), (torch.randn(1, 4, 70, 16), torch.randn(1, 4, 70))
    plain = run(inputs, MIXED, where, blocks, grads)
    both = run(inputs, MIXED, where, replace(blocks, columns=columns), grads)
    for name, x, y in zip(NAMES, both, plain, strict=True):
        same = 1 if name in ("dk", "dv") else 3
        assert torch.equal(x[:, :same], y[:, :same]) and not torch.equal(x[:, same:], y[:, same:]), name


def test_two_runs_give_the_same_bits() -> None:
    where = TokenPositions.causal(33, 70)
    selection = BlockSelection.from_mask(block_mask(where, 64, 1, 4), 64, random_columns(70, 1, 4))
    inputs = tensors(where, num_heads=4, dtype=torch.float16)
    grads = (torch.randn(inputs[0].shape).half(), torch.randn(inputs[0].shape[:3]))
    first, second = (run(inputs, ALL, where, selection, grads, deterministic=True) for _ in range(2))
    for name, x, y in zip(NAMES, first, second, strict=True):
        assert torch.equal(x, y), name


def test_no_column_at_all() -> None:
    where = TokenPositions.causal(70, 70)
    blocks = BlockSelection.from_mask(block_mask(where, 64, 1, 2), 64)
    inputs, grads = tensors(where), (torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70))
    none = replace(blocks, columns=torch.empty(1, 2, 0, dtype=torch.int32))
    plain = run(inputs, ALL, where, blocks, grads)
    assert all(torch.equal(x, y) for x, y in zip(run(inputs, ALL, where, none, grads), plain, strict=True))


def test_gradients_in_any_memory_order() -> None:
    """`out.sum()` sends an expanded gradient, and models may give q, k, v whose last dimension is not dense."""
    where = TokenPositions.causal(70, 70)
    selection = BlockSelection.from_mask(block_mask(where, 64, 1, 2), 64, random_columns(70, 1, 2))
    inputs, one = tensors(where), torch.ones(())
    plain = run(inputs, ALL, where, selection, (torch.ones(1, 2, 70, 16), torch.ones(1, 2, 70)))
    q, k, v = (x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in inputs)
    turned = run((q, k, v), ALL, where, selection, (one.expand(1, 2, 70, 16), one.expand(1, 2, 70)))
    for name, x, y in zip(NAMES, turned, plain, strict=True):
        assert torch.equal(x, y), name
