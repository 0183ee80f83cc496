"""The reference on inputs that overflow careless softmaxes (large, tiny, zero) and with other finite mask values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, TokenPositions, sparse_attention_reference
from sparse_hf_kernels.sparse_attention.reference import MASK_VALUE
from sparse_hf_kernels.sparse_attention.reference_backward import sparse_attention_backward_reference

LENGTH, HEAD_DIM = 300, 32


def layout_of(block_size: int) -> AttentionLayout:
    """A window with sinks, and blocks one of whose rows is empty."""
    rows = -(-LENGTH // block_size)
    mask = (torch.rand(rows, rows, generator=torch.Generator().manual_seed(0)) < 0.5).tril()
    mask[1] = False
    blocks = HeadPattern(blocks=BlockList.from_mask(mask, block_size))
    return AttentionLayout(patterns=(HeadPattern(window=40, num_sink_tokens=3), blocks))


def inputs(scale: float, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 4, LENGTH, HEAD_DIM), (1, 2, LENGTH, HEAD_DIM), (1, 2, LENGTH, HEAD_DIM))
    return [(torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_() for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Float64 softmax over the keys that are kept, one head at a time."""
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    outs = []
    for head in range(q.shape[1]):
        kv = head // 2
        allowed = layout.allowed(layout.patterns[kv], i, j)
        scores = (q[0, head].double() @ k[0, kv].double().T * scale).masked_fill(~allowed, float("-inf"))
        outs.append(scores.softmax(-1).nan_to_num(0.0) @ v[0, kv].double())
    return torch.stack(outs)[None]


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("scale", [100.0, 0.001, 0.0])
def test_extreme_inputs_stay_finite(scale: float, dtype: torch.dtype, block_size: int) -> None:
    layout, positions = layout_of(block_size), TokenPositions.causal(LENGTH, LENGTH)
    q, k, v = inputs(scale, dtype)
    options: dict[str, Any] = {"positions": positions, "scale": HEAD_DIM**-0.5}
    out, lse = sparse_attention_reference(q, k, v, layout, **options)
    assert out.dtype == dtype and out.isfinite().all() and not lse.isnan().any()
    truth = exact(q, k, v, layout, options["scale"])
    # Scores of 1e4 carry an fp32 error of 1e-3, and so do the weights.
    assert (out.double() - truth).abs().max() <= (16 * torch.finfo(dtype).eps + 8e-3) * scale
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    formula = sparse_attention_backward_reference(grad, None, q, k, v, out, lse, layout, **options)
    for name, by_autograd, by_formula in zip("qkv", found, formula, strict=True):
        assert by_autograd.isfinite().all() and by_formula.isfinite().all(), f"gradient of {name}"


@pytest.mark.parametrize("mask_value", [MASK_VALUE, -1e4, -3e38])
def test_the_mask_value_is_free(mask_value: float) -> None:
    """Any finite value far below the scores gives the same bits: masked weights are exactly 0."""
    layout = layout_of(64)
    options: dict[str, Any] = {"positions": TokenPositions.causal(LENGTH, LENGTH), "scale": HEAD_DIM**-0.5}
    q, k, v = inputs(1.0, torch.float32)
    expected, _ = sparse_attention_reference(q, k, v, layout, **options)
    out, _ = sparse_attention_reference(q, k, v, layout, mask_value=mask_value, **options)
    assert torch.equal(out, expected)
    assert MASK_VALUE == -1e9
    for tensor in torch.autograd.grad(out.sum(), (q, k, v)):
        assert tensor.isfinite().all()
