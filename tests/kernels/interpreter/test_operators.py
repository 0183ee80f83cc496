"""The operators end to end on a fused backend: dispatch, autograd, compiled graphs, the blend of two branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import (
    AttentionLayout,
    AttentionRequest,
    BlockList,
    HeadPattern,
    TokenPositions,
    layout_key,
    mixed_attention,
    select_backend,
    sparse_attention,
)

FULL = AttentionLayout.dense(3)
BLOCKS = BlockList(block_size=32, row_ptr=(0, 1, 1, 3), indices=(0, 0, 2))
LAYOUT = AttentionLayout(patterns=(HeadPattern(), HeadPattern(window=9, num_sink_tokens=3), HeadPattern(blocks=BLOCKS)))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    for layout in (FULL, LAYOUT):
        layout_key(layout)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_inputs(length: int) -> list[Tensor]:
    return [torch.randn(2, length, heads, 16).transpose(1, 2).requires_grad_() for heads in (6, 3, 3)]


def results(outs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of the inputs through all of them."""
    generator = torch.Generator().manual_seed(5)
    total = sum((x * torch.randn(x.shape, generator=generator))[x.isfinite()].sum() for x in outs)
    return [*(x.detach() for x in outs), *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)]


PLACES: dict[str, dict[str, Any]] = {
    "default": {},
    "padded": {"positions": TokenPositions.from_padding_mask(torch.arange(70) >= torch.tensor([[0], [33]]))},
    "packed": {"positions": TokenPositions.from_cu_seqlens(torch.tensor([0, 30, 70]))},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sparse_attention(place: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, k, v, LAYOUT, return_lse=True, **PLACES[place])

    run = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else attend
    inputs = make_inputs(70)
    assert select_backend(AttentionRequest.of("sparse_attention", inputs[0], LAYOUT)).backend.name == "triton"
    found = results(run(*inputs), inputs)
    monkeypatch.setenv("SPARSE_HF_BACKEND", "reference")
    for actual, expected in zip(found, results(attend(*inputs), inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [[0.2, 0.5, 0.9], [0.0, 1.0, 0.5]])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_mixed_attention(gate: list[float], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        return mixed_attention(q, k, v, z, FULL, LAYOUT, skip_saturated=True)

    run = torch.compile(mix, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else mix
    inputs = [*make_inputs(70), torch.tensor(gate, requires_grad=True)]
    found = results((run(*inputs),), inputs)
    monkeypatch.setenv("SPARSE_HF_BACKEND", "reference")
    for actual, expected in zip(found, results((mix(*inputs),), inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_only_the_log_sum_exp_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(40)
    found = results(sparse_attention(*inputs, LAYOUT, return_lse=True)[1:], inputs)
    monkeypatch.setenv("SPARSE_HF_BACKEND", "reference")
    for actual, expected in zip(
        found, results(sparse_attention(*inputs, LAYOUT, return_lse=True)[1:], inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_computes_the_forward_again() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs(40)

    def attend(*tensors: Tensor) -> Tensor:
        return sparse_attention(*tensors, LAYOUT) * 2

    plain = results((attend(*inputs),), inputs)
    again = results((checkpoint(attend, *inputs, use_reentrant=False),), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_second_derivative_is_refused() -> None:
    """The backward kernels are not differentiable; a wrong zero would be worse than an error."""
    q, k, v = make_inputs(20)
    (grad,) = torch.autograd.grad(sparse_attention(q, k, v, LAYOUT).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
