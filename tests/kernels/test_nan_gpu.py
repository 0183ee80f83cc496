"""NaN in queries or keys comes out of the fused kernels again."""

from __future__ import annotations

import pytest
import torch

from sparse_hf_kernels import AttentionLayout, sparse_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_nan_stays(monkeypatch: pytest.MonkeyPatch, backend: str, which: str) -> None:
    """What overflowed must not look like a row without keys, whose output and gradients are 0."""
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("gluon serves compute capability 9.0 alone")
    monkeypatch.setenv("SPARSE_HF_BACKEND", backend)
    q, k, v = (torch.randn(1, 2, 300, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    (q if which == "q" else k)[:, 0, 7] = float("nan")
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = sparse_attention(q, k, v, AttentionLayout.dense(2), return_lse=True)
    rows = slice(7, 8) if which == "q" else slice(7, 300)
    assert out[:, 0, rows].isnan().all() and lse[:, 0, rows].isnan().all()
    assert out[:, 0, :7].isfinite().all() and lse[:, 0, :7].isfinite().all()
    assert out[:, 1].isfinite().all() and lse[:, 1].isfinite().all()
    (grad_q,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert grad_q[:, 0, rows].isnan().any(-1).all()
