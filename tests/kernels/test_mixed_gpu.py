"""The fused mask-learning operator on a GPU: never further from fp32 than the same precision costs dense softmaxes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, HeadPattern, TokenPositions, layout_key, mixed_attention
from sparse_hf_kernels.backends import problem_of
from sparse_hf_kernels.mixed_attention.branches import branches_of
from sparse_hf_kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.gpu

EPS = {"out": 2e-3, "dq": 2e-3, "dk": 2e-3, "dv": 2e-3, "dz": 1e-2}
"""dz is a sum of millions of terms of either sign, small beside what their rounding adds up to."""
NAMES = tuple(EPS)
FULL = AttentionLayout.dense(2)


def heads(*patterns: HeadPattern, **kwargs: int) -> AttentionLayout:
    return AttentionLayout(patterns=patterns * (2 // len(patterns)), **kwargs)


STREAMING = heads(HeadPattern(window=200, num_sink_tokens=70))
LAYOUTS: dict[str, tuple[AttentionLayout, AttentionLayout]] = {
    "streaming": (FULL, STREAMING),
    "whole tiles": (FULL, heads(HeadPattern(window=256, num_sink_tokens=128))),
    "window of one": (FULL, heads(HeadPattern(window=1))),
    "native window": (
        AttentionLayout.dense(2, max_distance=300),
        heads(HeadPattern(window=130, num_sink_tokens=5), max_distance=300),
    ),
    "two patterns": (FULL, heads(HeadPattern(window=33), HeadPattern(window=200, num_sink_tokens=70))),
}


def places() -> dict[str, TokenPositions]:
    lengths, slots = torch.tensor([[600], [277], [1]], device="cuda"), torch.arange(600, device="cuda")
    holes = torch.rand(2, 500, generator=torch.Generator().manual_seed(1)) < 0.8
    return {
        "prefill": TokenPositions.causal(777, 777, "cuda"),
        "chunk": TokenPositions.causal(130, 786, "cuda"),
        "dropped prefix": TokenPositions.causal(300, 500, "cuda", k_offset=20),
        "left": TokenPositions.from_padding_mask(slots >= 600 - lengths),
        "right": TokenPositions.from_padding_mask(slots < lengths),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 400, 401, 800], device="cuda")),
        "holes": TokenPositions.from_padding_mask(holes.cuda()),
    }


@pytest.fixture(params=["gluon", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on each fused backend that this GPU has; `triton` must always be there."""
    if request.param == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("gluon serves compute capability 9.0 alone")
    monkeypatch.setenv("SPARSE_HF_BACKEND", request.param)
    return request.param


def make_inputs(where: TokenPositions, gate: list[float], group: int = 2, dim: int = 128) -> list[Tensor]:
    """bf16 q, k, v with the strides of a projection, NaN in empty slots of k and v; and the gate."""
    batch, made = max(*where.batches), []
    for number, length in ((2 * group, where.q_len), (2, where.kv_len), (2, where.kv_len)):
        x = torch.randn(batch, length, number, dim, device="cuda").bfloat16().transpose(1, 2)
        made.append(x if not made else x.masked_fill((where.k_positions < 0)[:, None, :, None], float("nan")))
    return [x.requires_grad_() for x in (*made, torch.tensor(gate, device="cuda"))]


def check(
    naive: Callable, inputs: list[Tensor], layouts: tuple[AttentionLayout, AttentionLayout], where: TokenPositions,
    name: str, *, skip: bool = False, deterministic: bool = False, names: tuple[str, ...] = NAMES,
) -> None:  # fmt: skip
    """Output and gradients."""
    out = mixed_attention(*inputs, *layouts, positions=where, skip_saturated=skip, deterministic=deterministic)
    grad_out = torch.randn_like(out)
    found = {"kernel": (out.detach(), *torch.autograd.grad(out, inputs, grad_out))}
    assert found["kernel"][4].dtype == torch.float32
    for what, precision in (("truth", torch.float32), ("same", torch.bfloat16)):
        q, k, v = (x.detach().nan_to_num().to(precision).requires_grad_() for x in inputs[:3])
        gate = inputs[3].detach().clone().requires_grad_()
        z = gate.repeat_interleave(q.shape[1] // 2)[:, None, None]
        full, sparse = (naive(q, k, v, layout, where, q.shape[-1] ** -0.5, precision)[0] for layout in layouts)
        blend = z * full + (1 - z) * sparse
        grads = torch.autograd.grad(blend, (q, k, v, gate), grad_out.to(blend.dtype))
        found[what] = (blend.detach(), *grads)
    for n, tensor in enumerate(names):
        tensors = (found[x][n] for x in ("kernel", "same", "truth"))
        assert_close_to_truth(*tensors, eps=EPS[tensor], name=f"{name}: {tensor}")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["prefill", "chunk", "dropped prefix", "left", "right", "packed", "holes"])
def test_layouts_and_positions(place: str, layout: str, naive: Callable) -> None:
    where = places()[place]
    check(naive, make_inputs(where, [0.3, 0.8]), LAYOUTS[layout], where, f"{layout}, {place}")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", [269, 270, 271, 1500])
def test_lengths_groups_dims(length: int, group: int, dim: int, naive: Callable) -> None:
    """270 tokens are those of the window and the sinks: one more, and one row reads one key besides."""
    where = TokenPositions.causal(length, length, "cuda")
    problems = (problem_of(torch.empty(0, device="cuda"), x, where, 1.0, False) for x in (FULL, STREAMING))
    disjoint = length > 270
    assert branches_of(*problems, None).disjoint == disjoint
    # Where the sparse branch is full attention, the gate's gradient is 0 but for rounding.
    names = NAMES if disjoint else NAMES[:4]
    check(naive, make_inputs(where, [0.3, 0.8], group, dim), (FULL, STREAMING), where, f"{length}", names=names)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("gate", [[0.0, 1.0], [0.0, 0.5], [0.4, 1.0], [0.0, 0.0], [1.0, 1.0]])
def test_saturated_gates(gate: list[float], skip: bool, naive: Callable) -> None:
    for place in ("prefill", "packed"):
        where = places()[place]
        # The gradient of a gate lacks the branch that was left out; test_mixed_attention.py has its value.
        names = NAMES[:4] if skip else NAMES
        inputs = make_inputs(where, gate)
        check(naive, inputs, (FULL, STREAMING), where, f"{gate}, {place}", skip=skip, names=names)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", ["streaming", "two patterns"])
def test_50_repeats_give_the_same_bits(layout: str, dim: int, naive: Callable) -> None:
    where = TokenPositions.causal(1000, 1000, "cuda")
    inputs, grad = make_inputs(where, [0.3, 0.8], 4, dim), None
    first = None
    for repeat in range(50):
        out = mixed_attention(*inputs, *LAYOUTS[layout], positions=where, deterministic=True)
        grad = torch.randn_like(out) if grad is None else grad
        found = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        first = first or found
        for name, a, b in zip(NAMES, found, first, strict=True):
            assert torch.equal(a, b), f"{name}, repeat {repeat}"
    check(naive, inputs, LAYOUTS[layout], where, "deterministic", deterministic=True)


def test_the_gates_gradient_is_always_repeatable() -> None:
    where = TokenPositions.causal(1000, 1000, "cuda")
    inputs = make_inputs(where, [0.3, 0.8])
    out = mixed_attention(*inputs, FULL, STREAMING, positions=where)
    grad = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, inputs[3], grad, retain_graph=True)[0] for _ in range(20))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("skip", [False, True])
def test_compiled_over_lengths(skip: bool) -> None:
    layout_key(FULL), layout_key(STREAMING)

    def mix(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        out = mixed_attention(q * 2, k, v, z, FULL, STREAMING, skip_saturated=skip, deterministic=True)
        return out.transpose(1, 2).flatten(2) * 2

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run = torch.compile(mix, fullgraph=True, dynamic=True)
        for length in (257, 300, 513):
            inputs = make_inputs(TokenPositions.causal(length, length, "cuda"), [1.0, 0.6])
            outs = [function(*inputs) for function in (mix, run)]
            grads = [torch.autograd.grad(out, inputs, torch.ones_like(out)) for out in outs]
            assert torch.equal(*outs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch._dynamo.reset()


def test_a_backward_pass_takes_no_more_than_its_gradients_and_one_sum(backend: str) -> None:
    """fp32 memory of q's shape once, for both branches together, and none in what is kept from the forward."""
    where = TokenPositions.causal(8192, 8192, "cuda")
    inputs = make_inputs(where, [0.3, 0.8], 8)
    size = inputs[0].numel() * 2
    before = torch.cuda.memory_allocated()
    out = mixed_attention(*inputs, FULL, STREAMING, positions=where)
    grad = torch.randn_like(out)
    kept = torch.cuda.memory_allocated() - before
    assert kept < 4.3 * size, f"output, gradient and two branches, got {kept / size:.2f} times q"
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, inputs, grad)
    peak = torch.cuda.max_memory_allocated() - before - kept
    # dq, and its fp32 sum (gluon) or a second dq (triton); k and v and their partial sums are an eighth.
    limit = 4.0 if backend == "gluon" else 2.8
    assert peak < limit * size, f"got {peak / size:.2f} times q"
