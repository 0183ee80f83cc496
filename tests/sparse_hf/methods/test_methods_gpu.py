"""Static methods on a GPU: what dispatch picks for bf16 against the fp32 reference, on the paths of generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_hf import (
    BigBird,
    Dilated,
    Fixed,
    HeadPlace,
    LocalGlobal,
    SlidingWindow,
    Strided,
    Triangle,
    TriShape,
)
from sparse_hf_kernels import AttentionLayout, TokenPositions, sparse_attention, sparse_attention_reference
from sparse_hf_kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.gpu

SIZES = (64, 128)
METHODS: list[Any] = [
    SlidingWindow(window_size=200),
    TriShape(num_sink_tokens=20, window_size=130, num_last_tokens=100),
    Triangle(),
    *(BigBird(block_size=size, num_random_blocks=2) for size in SIZES),
    *(Dilated(block_size=size, num_sink_blocks=1) for size in SIZES),
    *(Dilated.longnet(block_size=size, first_segment=2, num_levels=3) for size in SIZES),
    *(Strided(block_size=size, stride_blocks=3) for size in SIZES),
    *(Fixed(block_size=size, stride_blocks=3) for size in SIZES),
    *(LocalGlobal(block_size=size, num_local_heads=1) for size in SIZES),
]
PLACES = {
    "prefill": lambda: TokenPositions.causal(1111, 1111, "cuda"),
    "chunk": lambda: TokenPositions.causal(256, 1280, "cuda"),
    "odd chunk": lambda: TokenPositions.causal(130, 1033, "cuda"),
    "decode": lambda: TokenPositions.causal(1, 1111, "cuda"),
    "padded": lambda: TokenPositions.from_padding_mask(
        torch.arange(900, device="cuda") >= torch.tensor([[0], [333]], device="cuda")
    ),
    "packed": lambda: TokenPositions.from_cu_seqlens(torch.tensor([0, 500, 501, 1200], device="cuda")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'block_size', 'tokens')}")
def test_fused_equals_the_reference(method: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_HF_BACKEND", raising=False)
    layout = AttentionLayout(patterns=tuple(method.pattern(HeadPlace(layer=1, kv_head=head)) for head in range(2)))
    where = PLACES[place]()
    batch = max(where.batches)
    shapes = [(batch, 4, where.q_len, 128), *[(batch, 2, where.kv_len, 128)] * 2]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)

    def run(function: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        out = function(*tensors, layout, positions=where, scale=128**-0.5, **options)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    truth = run(sparse_attention_reference, [x.detach().float().requires_grad_() for x in inputs])
    same = run(sparse_attention_reference, inputs)
    for name, ours, theirs, exact in zip(
        ("out", "dq", "dk", "dv"), run(sparse_attention, inputs), same, truth, strict=True
    ):
        assert_close_to_truth(ours, theirs, exact, eps=5e-3, name=f"{name} of {method.name}, {place}")
