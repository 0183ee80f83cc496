"""`mixed_attention` is gate * full + (1 - gate) * sparse, and its gate has that expression's gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import (
    AttentionLayout,
    BlockList,
    HeadPattern,
    TokenPositions,
    mixed_attention,
    mixed_attention_reference,
    sparse_attention_reference,
)
from sparse_hf_kernels.mixed_attention.composed import composed_backward, composed_forward
from sparse_hf_kernels.sparse_attention.reference_backward import sparse_attention_backward_reference
from sparse_hf_kernels.testing import assert_close_to_truth

SCALE = 0.3
FULL = AttentionLayout.dense(3)
SPARSE = AttentionLayout(
    patterns=(
        HeadPattern(window=5),
        HeadPattern(window=4, num_sink_tokens=2),
        HeadPattern(blocks=BlockList(block_size=32, row_ptr=(0, 1, 1, 2), indices=(0, 1))),
    )
)


def make_inputs(gate: list[float], group: int = 2, length: int = 70) -> list[Tensor]:
    tensors = [torch.randn(2, heads, length, 16, requires_grad=True) for heads in (3 * group, 3, 3)]
    return [*tensors, torch.tensor(gate, requires_grad=True)]


def naive_mixture(naive: Callable, inputs: list[Tensor], positions: TokenPositions) -> Tensor:
    q, k, v, gate = inputs
    full, sparse = (naive(q, k, v, layout, positions, SCALE)[0] for layout in (FULL, SPARSE))
    z = gate.repeat_interleave(q.shape[1] // k.shape[1])[:, None, None]
    return z * full + (1 - z) * sparse


def doubles_of(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


@pytest.mark.parametrize("gate", [[0.3, 0.5, 0.9], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_definition(naive: Callable, gate: list[float], group: int, padded: bool) -> None:
    inputs = make_inputs(gate, group)
    mask = torch.arange(70) >= (torch.tensor([[0], [33]]) if padded else 0)
    positions = TokenPositions.from_padding_mask(mask.expand(2, -1))
    out = mixed_attention(*inputs, FULL, SPARSE, positions=positions, scale=SCALE)
    doubles = doubles_of(inputs)
    truth = naive_mixture(naive, doubles, positions)
    assert_close_to_truth(out.detach(), truth.detach(), truth.detach(), eps=2e-6, name="out")
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    true_grads = torch.autograd.grad((truth * weight).sum(), doubles)
    for name, grad, true in zip(("q", "k", "v", "gate"), grads, true_grads, strict=True):
        assert_close_to_truth(grad, true, true, eps=5e-6, name=f"gradient of {name}")
    assert bool((grads[3] != 0).all()), "a gate at 0 or 1 has a gradient too"


@pytest.mark.parametrize("gate", [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.2, 0.4, 0.6]])
def test_skip_saturated(naive: Callable, gate: list[float]) -> None:
    """The same output and q, k, v gradients; the gate's gradient lacks the branch that was left out."""
    inputs = make_inputs(gate)
    positions = TokenPositions.causal(70, 70)
    out = mixed_attention(*inputs, FULL, SPARSE, scale=SCALE, skip_saturated=True)
    doubles = doubles_of(inputs)
    truth = naive_mixture(naive, doubles, positions)
    assert_close_to_truth(out.detach(), truth.detach(), truth.detach(), eps=2e-6, name="out")
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    true_grads = torch.autograd.grad((truth * weight).sum(), doubles)
    for name, grad, true in zip("qkv", grads, true_grads, strict=False):
        assert_close_to_truth(grad, true, true, eps=5e-6, name=f"gradient of {name}")
    branches = [naive(*(x.detach() for x in inputs[:3]), layout, positions, SCALE)[0] for layout in (FULL, SPARSE)]
    full, sparse = ((branch * weight).unflatten(1, (3, 2)).sum((0, 2, 3, 4)) for branch in branches)
    z = torch.tensor(gate)
    expected = torch.where(z > 0, full, 0.0) - torch.where(z < 1, sparse, 0.0)
    assert_close_to_truth(grads[3], expected, expected, eps=5e-6, name="gradient of gate")


@pytest.mark.parametrize("gate", [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.2, 0.4, 0.6]])
@pytest.mark.parametrize("skip_saturated", [False, True])
def test_passes_composed_of_two_calls(gate: list[float], skip_saturated: bool) -> None:
    """What compiled graphs call on backends without passes of their own: the same numbers, the same heads left out."""
    inputs = make_inputs(gate)
    options = {"positions": TokenPositions.causal(70, 70), "scale": SCALE, "skip_saturated": skip_saturated}
    computed = []

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, **kwargs: object) -> tuple[Tensor, Tensor]:
        computed.append(layout)
        return sparse_attention_reference(q, k, v, layout, **kwargs)

    def attend_backward(*args: Any, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
        computed.append(args[-1])
        return sparse_attention_backward_reference(*args, **kwargs)

    expected = mixed_attention_reference(*inputs, FULL, SPARSE, **options)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    detached = tuple(x.detach() for x in inputs)
    out, *kept = composed_forward(attend, *detached, FULL, SPARSE, **options, deterministic=True)
    saved = (*detached, *kept)
    grads = composed_backward(attend_backward, weight, saved, FULL, SPARSE, **options, deterministic=True)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-6, atol=1e-6)
    for name, actual, true in zip(("q", "k", "v", "gate"), grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-5, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    needs_full = [h for h, z in enumerate(gate) if z > 0 or not skip_saturated]
    needs_sparse = [h for h, z in enumerate(gate) if z < 1 or not skip_saturated]
    pairs = (FULL, needs_full), (SPARSE, needs_sparse)
    assert computed == 2 * [layout.select(heads) for layout, heads in pairs if heads]


@pytest.mark.parametrize(("gate", "left_out"), [(0.0, FULL), (1.0, SPARSE)])
def test_skip_saturated_does_not_compute_the_other_branch(
    monkeypatch: pytest.MonkeyPatch, gate: float, left_out: AttentionLayout
) -> None:
    from sparse_hf_kernels.mixed_attention import reference

    computed = []
    original = reference.sparse_attention_reference

    def noting(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, **kwargs: object) -> tuple[Tensor, Tensor]:
        computed.append(layout)
        return original(q, k, v, layout, **kwargs)

    monkeypatch.setattr(reference, "sparse_attention_reference", noting)
    inputs = make_inputs([gate] * 3)
    mixed_attention(*inputs, FULL, SPARSE, skip_saturated=True)
    assert len(computed) == 1 and computed[0] != left_out
    computed.clear()
    mixed_attention(*inputs, FULL, SPARSE)
    assert len(computed) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_an_fp32_gate(naive: Callable, dtype: torch.dtype) -> None:
    q, k, v, gate = make_inputs([0.25, 0.5, 1.0])
    inputs = [*(x.detach().to(dtype).requires_grad_() for x in (q, k, v)), gate]
    out = mixed_attention(*inputs, FULL, SPARSE, scale=SCALE)
    assert out.dtype == dtype
    doubles = doubles_of(inputs)
    truth = naive_mixture(naive, doubles, TokenPositions.causal(70, 70))
    eps = torch.finfo(dtype).eps
    assert (out - truth).norm() / truth.norm() < eps
    weight = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    for grad, x, true in zip(grads, inputs, torch.autograd.grad((truth * weight).sum(), doubles), strict=True):
        assert grad.dtype == x.dtype
        assert (grad - true).norm() / true.norm() < eps


def test_inputs_that_do_not_fit() -> None:
    q, k, v, gate = make_inputs([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="scale must be positive"):
        mixed_attention(q, k, v, gate, FULL, SPARSE, scale=-1.0)
    for bad in (gate[:2], gate[None], gate[0]):
        with pytest.raises(ValueError, match=r"gate must be \[3\]"):
            mixed_attention(q, k, v, bad, FULL, SPARSE)
    for full, sparse in ((AttentionLayout.dense(2), SPARSE), (FULL, AttentionLayout.dense(2))):
        with pytest.raises(ValueError, match="the layout describes 2 KV heads"):
            mixed_attention(q, k, v, gate, full, sparse)
    selected = AttentionLayout(patterns=(HeadPattern(selected=True),) * 3)
    for full, sparse in ((selected, SPARSE), (FULL, selected)):
        with pytest.raises(ValueError, match="static patterns"):
            mixed_attention(q, k, v, gate, full, sparse)
    q, k, v, gate = make_inputs([0.1, 0.2, 0.3], length=97)
    with pytest.raises(ValueError, match="covers 96 tokens, got a sequence of 97"):
        mixed_attention(q, k, v, gate, FULL, SPARSE)
    with pytest.raises(ValueError, match="covers 96 tokens, got a sequence of 97"):
        mixed_attention(q, k, v, gate, SPARSE, FULL)
