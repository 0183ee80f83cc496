"""Fused backends on a GPU: never further from fp32 than the same precision costs a dense softmax, plus a little.

Most kernels are compiled for head_dim 128 in bf16, which the matrix of layouts and positions uses; what only changes
numbers is tried at other sizes on the commonest paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_kernels import (
    AttentionLayout,
    AttentionRequest,
    BlockList,
    HeadPattern,
    TokenPositions,
    available_backends,
    layout_key,
    mixed_attention,
    select_backend,
    sparse_attention,
)
from sparse_hf_kernels.testing import assert_close_to_truth
from sparse_hf_kernels.tiles import RowGeometry

pytestmark = pytest.mark.gpu

EPS = 1e-3
NAMES = ("out", "dq", "dk", "dv")
STREAMING = HeadPattern(window=200, num_sink_tokens=70)
WINDOW = HeadPattern(window=33)
MIXED = AttentionLayout(patterns=(HeadPattern(), STREAMING))


@pytest.fixture(params=["gluon", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on each fused backend that this GPU has; `triton` must always be there."""
    monkeypatch.delenv("SPARSE_HF_BACKEND", raising=False)
    if request.param == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("gluon serves compute capability 9.0 alone")
    monkeypatch.setenv("SPARSE_HF_BACKEND", request.param)
    return request.param


def blocks(num_rows: int, size: int, causal: bool = True) -> HeadPattern:
    mask = torch.rand(num_rows, num_rows, generator=torch.Generator().manual_seed(num_rows)) < 0.5
    return HeadPattern(blocks=BlockList.from_mask(mask.tril() if causal else mask, size))


def layouts(causal: bool) -> dict[str, AttentionLayout]:
    """Two KV heads each."""
    made = {
        "dense and streaming": (HeadPattern(), STREAMING),
        "windows": (WINDOW, STREAMING),
        "blocks": (blocks(6, 128, causal), STREAMING),
        "cut blocks": (blocks(20, 32, causal), HeadPattern()),
    }
    found = {name: AttentionLayout(patterns=patterns, causal=causal) for name, patterns in made.items()}
    found["native window"] = AttentionLayout(patterns=(STREAMING, HeadPattern()), max_distance=150, causal=causal)
    if causal:
        last = HeadPattern(window=200, num_sink_tokens=5, num_last_tokens=70)
        found["last rows"] = AttentionLayout(patterns=(last, blocks(6, 128)))
        found["last rows, tiles"] = AttentionLayout(patterns=(replace(last, num_last_tokens=1), STREAMING))
        found["dense rows"] = AttentionLayout(patterns=(STREAMING, blocks(6, 128)), num_dense_rows=128)
    return found


def places(device: str = "cuda") -> dict[str, TokenPositions]:
    lengths, slots = torch.tensor([[400], [177], [1]], device=device), torch.arange(400, device=device)
    holes = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.6
    return {
        "prefill": TokenPositions.causal(513, 513, device),
        "chunk": TokenPositions.causal(130, 386, device),
        "odd chunk": TokenPositions.causal(130, 433, device),
        "dropped prefix": TokenPositions.causal(5, 260, device, k_offset=100),
        "decode": TokenPositions.causal(1, 500, device),
        "left": TokenPositions.from_padding_mask(slots >= 400 - lengths),
        "right": TokenPositions.from_padding_mask(slots < lengths),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 190, 191, 330, 600], device=device)),
        "holes": TokenPositions.from_padding_mask(holes.to(device)),
    }


def heads_of(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`[batch, heads, length, dim]` with the strides of a projection, as transformers gives it."""
    return torch.randn(batch, length, heads, dim, device="cuda").to(dtype).transpose(1, 2).requires_grad_()


def make_inputs(
    where: TokenPositions, group: int = 2, dim: int = 128, dtype: torch.dtype = torch.bfloat16, batch: int = 0
) -> list[Tensor]:
    """q, k, v; NaN in slots of k and v without token."""
    batch = batch or max(*where.batches)
    q, k, v = (
        heads_of(batch, n, length, dim, dtype) for n, length in ((2 * group, where.q_len), *[(2, where.kv_len)] * 2)
    )
    if where.offset is None:
        empty = (where.k_positions < 0)[:, None, :, None]
        k, v = (x.detach().masked_fill(empty, float("nan")).requires_grad_() for x in (k, v))
    return [q, k, v]


def naive(
    inputs: list[Tensor], layout: AttentionLayout, where: TokenPositions, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Copies of the inputs in `dtype`, output and log-sum-exp by one softmax over a dense mask, all in `dtype`."""
    q, k, v = copies = [x.detach().nan_to_num().to(dtype).requires_grad_() for x in inputs]
    i, j = where.q_positions[:, :, None], where.k_positions[:, None, :]
    group, visible = q.shape[1] // k.shape[1], where.visible(slice(None))
    last = j.expand_as(visible).masked_fill(~visible, -1).amax(-1, keepdim=True)
    allowed = torch.stack([visible & layout.allowed(pattern, i, j, last) for pattern in layout.patterns], 1)
    allowed = allowed.repeat_interleave(group, 1)
    some = allowed.any(-1, keepdim=True)
    scores = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed & some, float("-inf"))
    out = torch.where(some, scores.softmax(-1) @ v.repeat_interleave(group, 1), 0.0)
    return copies, out, torch.where(some[..., 0], scores.logsumexp(-1), float("-inf"))


def check(inputs: list[Tensor], layout: AttentionLayout, where: TokenPositions, name: str, **kwargs: Any) -> None:
    """Output, log-sum-exp and the gradients of q, k and v through both."""
    dtype = inputs[0].dtype
    out, lse = sparse_attention(*inputs, layout, positions=where, return_lse=True, **kwargs)
    grad_out, grad_lse = torch.randn(out.shape, device="cuda").to(dtype), torch.randn(lse.shape, device="cuda")
    grads = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    found, found["kernel"] = {}, (out.detach(), *grads)
    for what, precision in (("truth", torch.float32), ("same", dtype)):
        copies, other, other_lse = naive(inputs, layout, where, precision)
        if what == "truth":
            assert torch.equal(lse.isinf(), other_lse.isinf()), f"{name}: rows without key"
            torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=2e-3, msg=lambda text: f"{name}: lse: {text}")
        known = other_lse.isfinite()
        total = (other * grad_out.to(precision)).sum() + (other_lse * grad_lse.to(precision))[known].sum()
        found[what] = (other.detach(), *torch.autograd.grad(total, copies))
    for n, tensor in enumerate(NAMES):
        assert_close_to_truth(*(found[x][n] for x in ("kernel", "same", "truth")), eps=EPS, name=f"{name}: {tensor}")


def served(backend: str, inputs: list[Tensor], layout: AttentionLayout, where: TokenPositions) -> bool:
    """Whether the backend takes the call; a block list that tiles cut is all that gluon may refuse here."""
    request = AttentionRequest.of("sparse_attention", inputs[0], layout, positions=where, v=inputs[2])
    return not (backend == "gluon" and request.cuts_blocks)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("place", places("cpu"))
def test_layouts_and_positions(place: str, backend: str) -> None:
    where = places()[place]
    for name, layout in layouts(True).items():
        inputs = make_inputs(where)
        if served(backend, inputs, layout, where):
            check(inputs, layout, where, name)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("place", ["prefill", "chunk", "left"])
def test_without_causality(place: str, backend: str) -> None:
    where = places()[place]
    for name, layout in layouts(False).items():
        inputs = make_inputs(where)
        if served(backend, inputs, layout, where):
            check(inputs, layout, where, name)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 4095])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_lengths_dims_dtypes(dtype: torch.dtype, dim: int, length: int) -> None:
    where = TokenPositions.causal(length, length, "cuda")
    check(make_inputs(where, 4, dim, dtype), MIXED, where, "mixed")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_queries(group: int) -> None:
    where = TokenPositions.causal(513, 513, "cuda")
    for dim in (64, 128):
        check(make_inputs(where, group, dim, batch=2), MIXED, where, f"head_dim {dim}")


@pytest.mark.usefixtures("poison_empty")
def test_rows_and_calls_without_keys(backend: str) -> None:
    """Padding alone, and an empty block row: output 0, log-sum-exp -inf, gradients exactly 0."""
    nobody = TokenPositions.from_padding_mask(torch.zeros(2, 200, device="cuda"))
    empty_row = BlockList(block_size=128, row_ptr=(0, 1, 1), indices=(0,))
    listed = AttentionLayout(patterns=(HeadPattern(blocks=empty_row), HeadPattern(blocks=empty_row)))
    for layout, where, rows in (
        (MIXED, nobody, slice(0, 200)),
        (listed, TokenPositions.causal(200, 200), slice(128, 200)),
    ):
        inputs = make_inputs(where)
        out, lse = sparse_attention(*inputs, layout, positions=where, return_lse=True)
        assert bool((out[:, :, rows] == 0).all()) and bool((lse[:, :, rows] == float("-inf")).all())
        # A log-sum-exp of -inf is a constant: whatever its gradient is, NaN too, goes nowhere.
        grad_lse = torch.ones_like(lse).masked_fill(lse.isinf(), float("nan"))
        grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), grad_lse))
        assert bool((grads[0][:, :, rows] == 0).all()) and all(bool(grad.isfinite().all()) for grad in grads)


def test_strides_change_nothing() -> None:
    """Slices of a fused projection, contiguous tensors and a batch that is expanded: the same bits."""
    where = TokenPositions.causal(300, 300, "cuda")
    fused = torch.randn(2, 300, 8, 128, device="cuda", dtype=torch.bfloat16)
    fused[1] = fused[0]
    views = [fused[:, :, part].transpose(1, 2) for part in (slice(0, 4), slice(4, 6), slice(6, 8))]
    kinds = {
        "slices": views,
        "contiguous": [x.contiguous() for x in views],
        "expanded": [x[:1].expand(2, -1, -1, -1) for x in views],
        "head_dim not dense": [x.transpose(2, 3).contiguous().transpose(2, 3) for x in views],
    }
    results = {}
    for name, tensors in kinds.items():
        inputs = [x.detach().requires_grad_() for x in tensors]
        out = sparse_attention(*inputs, MIXED, positions=where, deterministic=True)
        weight = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).to(out.dtype)
        results[name] = (out.detach(), *torch.autograd.grad(out, inputs, weight))
    for name, tensors in results.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, results["slices"], strict=True)), name


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_200_repeats_give_the_same_bits(dim: int) -> None:
    where = TokenPositions.causal(1000, 1000, "cuda")
    inputs = make_inputs(where, 4, dim)
    grad = torch.randn_like(inputs[0])
    first = None
    for repeat in range(200):
        out, lse = sparse_attention(*inputs, MIXED, positions=where, return_lse=True, deterministic=True)
        found = (out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), f"repeat {repeat}"
    check(inputs, MIXED, where, "deterministic", deterministic=True)


def test_the_global_switch_asks_for_determinism(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    from sparse_hf_kernels import backends

    asked = []
    original = backends.problem_of
    monkeypatch.setattr(backends, "problem_of", lambda *args: asked.append(args[-1]) or original(*args))
    inputs = make_inputs(TokenPositions.causal(128, 128, "cuda"))
    sparse_attention(*inputs, MIXED)
    torch.use_deterministic_algorithms(True)
    try:
        sparse_attention(*inputs, MIXED)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_32k_tokens_on_samples() -> None:
    """Rows of the output and of dq, keys of dk and dv, from their definitions in fp32."""
    length, dim = 32768, 128
    q, k, v = inputs = [heads_of(1, 2, length, dim, torch.bfloat16) for _ in range(3)]
    out, lse = sparse_attention(*inputs, MIXED, return_lse=True)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad)
    some = torch.cat([torch.tensor([0, 69, 70, 127, 128, length - 1]), torch.randint(length, (58,))]).cuda()
    every, scale = torch.arange(length, device="cuda"), dim**-0.5
    for head, pattern in enumerate(MIXED.patterns):
        q_all, k_all, v_all, do_all, o_all = (x[0, head].detach().float() for x in (q, k, v, grad, out))
        allowed = MIXED.allowed(pattern, some[:, None], every[None])
        weights = (q_all[some] @ k_all.T * scale).masked_fill(~allowed, float("-inf")).softmax(-1)
        torch.testing.assert_close(
            lse[0, head, some], lse_of(q_all[some] @ k_all.T * scale, allowed), rtol=1e-4, atol=1e-3
        )
        expected = {"out": weights @ v_all}
        delta = (do_all * o_all).sum(-1)
        d_scores = weights * (do_all[some] @ v_all.T - delta[some, None]) * scale
        expected["dq"] = d_scores @ k_all
        # Weights of the sampled keys in all rows, by the log-sum-exp that was just found right.
        allowed = MIXED.allowed(pattern, every[:, None], some[None])
        weights = (q_all @ k_all[some].T * scale - lse[0, head, :, None]).exp().masked_fill(~allowed, 0)
        d_scores = weights * (do_all @ v_all[some].T - delta[:, None]) * scale
        expected["dk"], expected["dv"] = d_scores.T @ q_all, weights.T @ do_all
        for name, tensor in zip(NAMES, (out, *grads), strict=True):
            error = (tensor[0, head, some].float() - expected[name]).norm() / expected[name].norm()
            assert error < 1e-2, f"{name} of head {head}: {error:.1e}"


def lse_of(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("skip_saturated", [False, True])
def test_mixed_attention(skip_saturated: bool) -> None:
    where = TokenPositions.causal(513, 513, "cuda")
    full = AttentionLayout.dense(2)
    for gate in ([0.3, 0.8], [0.0, 1.0]):
        inputs = make_inputs(where, batch=2)
        z = torch.tensor(gate, device="cuda", requires_grad=True)
        out = mixed_attention(*inputs, z, full, MIXED, positions=where, skip_saturated=skip_saturated)
        grad = torch.randn_like(out)
        grads = {"kernel": torch.autograd.grad(out, [*inputs, z], grad)}
        outs = {"kernel": out}
        for what, precision in (("truth", torch.float32), ("same", torch.bfloat16)):
            copies = [x.detach().to(precision).requires_grad_() for x in inputs]
            other_z = z.detach().clone().requires_grad_()
            # `naive` makes copies of its own: their gradients reach these through two calls that share the tensors.
            a, b = (naive_on(copies, layout, where) for layout in (full, MIXED))
            weight = other_z.repeat_interleave(2)[:, None, None]
            outs[what] = weight * a + (1 - weight) * b
            grads[what] = torch.autograd.grad(outs[what], [*copies, other_z], grad.to(outs[what].dtype))
        assert_close_to_truth(*(outs[x].detach() for x in ("kernel", "same", "truth")), eps=EPS, name="out")
        for n, name in enumerate(("dq", "dk", "dv", "dz")):
            if name == "dz" and skip_saturated and gate[0] in (0.0, 1.0):
                continue  # lacks the branch that was left out; tests/kernels/test_mixed_attention.py has its value
            assert_close_to_truth(
                *(grads[x][n] for x in ("kernel", "same", "truth")), eps=5 * EPS, name=f"{gate} {name}"
            )


def naive_on(inputs: list[Tensor], layout: AttentionLayout, where: TokenPositions) -> Tensor:
    """Dense attention of these very tensors, in their precision."""
    q, k, v = inputs
    i, j = where.q_positions[:, :, None], where.k_positions[:, None, :]
    group = q.shape[1] // k.shape[1]
    allowed = torch.stack([layout.allowed(pattern, i, j) for pattern in layout.patterns], 1).repeat_interleave(group, 1)
    scores = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)


@torch.no_grad()
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 500), (513, 513), (130, 386)], ids=["decode", "prefill", "chunk"])
def test_cuda_graph(q_len: int, kv_len: int) -> None:
    """Captured after one warm-up call, replayed on other inputs."""
    where = TokenPositions.causal(q_len, kv_len, "cuda")
    static = [x.detach() for x in make_inputs(where)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sparse_attention(*static, MIXED)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(*static, MIXED)
    for _ in range(3):
        fresh = [x.detach() for x in make_inputs(where)]
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(out, sparse_attention(*fresh, MIXED))


def test_cuda_graph_of_a_training_step() -> None:
    where = TokenPositions.causal(513, 513, "cuda")
    static = make_inputs(where)
    grad = torch.randn_like(static[0])

    def step() -> tuple[Tensor, ...]:
        out = sparse_attention(*static, MIXED, deterministic=True)
        return out, *torch.autograd.grad(out, static, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in static:
            x.copy_(torch.randn_like(x))
    graph.replay()
    results = [x.detach().clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.fixture
def compiled() -> Iterator[Callable[[Any], Any]]:
    """`torch.compile` into one graph, where a second compilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda function: torch.compile(function, fullgraph=True, dynamic=True)
    torch._dynamo.reset()


def test_compiled_over_lengths(compiled: Callable) -> None:
    layout_key(MIXED)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q * 2, k, v, MIXED, deterministic=True).transpose(1, 2).flatten(2) * 2

    run = compiled(attend)
    for length in (257, 300, 513):
        inputs = make_inputs(TokenPositions.causal(length, length, "cuda"))
        outs = [function(*inputs) for function in (attend, run)]
        grads = [torch.autograd.grad(out, inputs, torch.ones_like(out)) for out in outs]
        assert torch.equal(*outs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def llama(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> LlamaForCausalLM:
    """Two layers with head_dim 64, one KV head each of dense and streaming."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, **kwargs,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", dtype)
    return sparsify(
        model, SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=64), head_masks=((1, 0), (0, 1)))
    )


def train_step(model: Any, run: Any, ids: Tensor, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    loss = run(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_a_compiled_model_over_lengths(compiled: Callable) -> None:
    model = llama()
    run = compiled(model)
    for length in (300, 257, 400):
        ids = torch.randint(1, 99, (2, length), device="cuda")
        for a, b in zip(train_step(model, run, ids), train_step(model, model, ids), strict=True):
            # Inductor rounds to bf16 in other places than eager does.
            assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 weights under autocast: the kernels get bf16, the gradients come back in fp32."""
    model, ids = llama(torch.float32), torch.randint(1, 99, (2, 300), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = train_step(model, model, ids)
        monkeypatch.setenv("SPARSE_HF_BACKEND", "reference")
        expected = train_step(model, model, ids)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 0.03 * b.norm() + 1e-6


def test_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients to the bit, from one forward more per layer."""
    from sparse_hf_kernels.sparse_attention import autograd

    calls = []
    original = autograd.fused_attention
    monkeypatch.setattr(autograd, "fused_attention", lambda *args: calls.append(1) or original(*args))
    model, ids = llama(), torch.randint(1, 99, (2, 300), device="cuda")
    model.train()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain = train_step(model, model, ids)
        assert len(calls) == 2
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = train_step(model, model, ids)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 2 + 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_dispatch_without_the_variable(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """What a user gets: Hopper kernels on Hopper, the portable ones for fp32 and for blocks that tiles cut."""
    monkeypatch.delenv("SPARSE_HF_BACKEND")
    assert available_backends() == ("sdpa", "gluon", "triton", "reference") and "SPARSE_HF_BACKEND" not in os.environ
    hopper = torch.cuda.get_device_capability() == (9, 0)
    where = TokenPositions.causal(128, 128, "cuda")

    def chosen(layout: AttentionLayout, **kwargs: Any) -> str:
        inputs = make_inputs(where, **kwargs)
        request = AttentionRequest.of("sparse_attention", inputs[0], layout, positions=where, v=inputs[2])
        return select_backend(request).backend.name

    assert chosen(MIXED) == ("gluon" if hopper else "triton")
    assert chosen(MIXED, dtype=torch.float32) == "triton" and chosen(layouts(True)["cut blocks"]) == "triton"


def test_the_closed_form_needs_no_wait() -> None:
    """After a warm-up call, nothing between the inputs and the gradients asks the device for a value."""
    where = TokenPositions.causal(513, 513, "cuda")
    inputs = make_inputs(where)
    for mode in (0, "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = sparse_attention(*inputs, MIXED)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode(0)
    assert RowGeometry.of(where).is_closed_form
