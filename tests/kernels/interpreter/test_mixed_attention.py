"""The fused mask-learning operator in Triton's interpreter against the reference: output and all gradients."""

from __future__ import annotations

from collections.abc import Callable

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
)
from sparse_hf_kernels.backends import problem_of
from sparse_hf_kernels.mixed_attention.blend_kernels import blend, unblend
from sparse_hf_kernels.mixed_attention.branches import branches_of
from sparse_hf_kernels.testing import assert_close_to_truth

SCALE = 0.3
NAMES = ("out", "dq", "dk", "dv", "dz")
STREAMING = HeadPattern(window=20, num_sink_tokens=3)
BLOCKS = HeadPattern(blocks=BlockList(block_size=32, row_ptr=(0, 1, 1, 3), indices=(0, 0, 2)))


def heads(pattern: HeadPattern, **kwargs: int) -> AttentionLayout:
    return AttentionLayout(patterns=(pattern, pattern), **kwargs)


LAYOUTS: dict[str, tuple[AttentionLayout, AttentionLayout, bool]] = {
    # Full and sparse layout, and whether the wide branch is what the sparse one leaves out.
    "streaming": (AttentionLayout.dense(2), heads(STREAMING), True),
    "window": (AttentionLayout.dense(2), heads(HeadPattern(window=33)), True),
    "one key": (AttentionLayout.dense(2), heads(HeadPattern(window=1)), True),
    "sinks past a tile": (AttentionLayout.dense(2), heads(HeadPattern(window=7, num_sink_tokens=34)), True),
    "native window": (AttentionLayout.dense(2, max_distance=40), heads(STREAMING, max_distance=40), True),
    "dense rows of the window": (AttentionLayout.dense(2), heads(STREAMING, num_dense_rows=20), True),
    "dense rows past the window": (AttentionLayout.dense(2), heads(STREAMING, num_dense_rows=30), False),
    "two patterns": (AttentionLayout.dense(2), AttentionLayout(patterns=(STREAMING, HeadPattern(window=5))), False),
    "blocks": (AttentionLayout.dense(2), heads(BLOCKS), False),
    "not full": (heads(HeadPattern(window=40)), heads(STREAMING), False),
    "both ways": (AttentionLayout.dense(2, causal=False), heads(STREAMING, causal=False), False),
    "shorter native window": (AttentionLayout.dense(2, max_distance=40), heads(STREAMING), False),
    "sparse is full": (AttentionLayout.dense(2), heads(HeadPattern(window=200)), False),
}


def places() -> dict[str, TokenPositions]:
    slots = torch.arange(40)
    holes = torch.rand(1, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    return {
        "prefill": TokenPositions.causal(50, 50),
        "chunk": TokenPositions.causal(18, 50),
        "dropped prefix": TokenPositions.causal(5, 40, k_offset=2),
        "left": TokenPositions.from_padding_mask(slots >= torch.tensor([[0], [13]])),
        "right": TokenPositions.from_padding_mask(slots < torch.tensor([[40], [1]])),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 25, 26, 50])),
        "holes": TokenPositions.from_padding_mask(holes),
        "nobody": TokenPositions.from_padding_mask(torch.zeros(1, 20, dtype=torch.bool)),
    }


def make_inputs(
    where: TokenPositions, gate: list[float], group: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v as views like a model's, NaN in empty slots of k and v; and the gate."""
    batch, made = max(*where.batches), []
    for number, at in ((2 * group, None), (2, where.k_positions), (2, where.k_positions)):
        length = where.q_len if at is None else where.kv_len
        x = torch.randn(batch, length, number, head_dim).to(dtype).transpose(1, 2)
        made.append(x if at is None else x.masked_fill((at < 0)[:, None, :, None], float("nan")))
    return [x.requires_grad_() for x in (*made, torch.tensor(gate))]


def check(
    where: TokenPositions, full: AttentionLayout, sparse: AttentionLayout, inputs: list[Tensor], name: str,
    *, skip: bool = False, eps: float = 1e-5,
) -> None:  # fmt: skip
    options = dict(positions=where, scale=SCALE, skip_saturated=skip)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    outs = [
        mixed_attention(*inputs, full, sparse, **options),
        mixed_attention_reference(*exact, full, sparse, **options),
    ]
    grad_out = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, x, grad_out.to(out.dtype)) for out, x in zip(outs, (inputs, exact), strict=True)]
    assert outs[0].dtype == inputs[0].dtype and grads[0][3].dtype == torch.float32
    for what, x, y in zip(NAMES, (outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert x.shape == y.shape
        # dz is a small difference of sums over everything, in the reference too.
        allowed = 10 * eps if what == "dz" else eps
        assert_close_to_truth(x.detach(), y.detach(), y.detach(), eps=allowed, name=f"{name}: {what}")


CALLS = [
    *((layout, "prefill") for layout in LAYOUTS),
    *(("streaming", place) for place in places() if place != "prefill"),
    *(("two patterns", place) for place in ("left", "packed")),
]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("layout", "place"), CALLS)
def test_layouts_and_positions(layout: str, place: str) -> None:
    where, (full, sparse, _) = places()[place], LAYOUTS[layout]
    check(where, full, sparse, make_inputs(where, [0.3, 0.8], group=1), f"{layout}, {place}")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("gate", [[0.0, 1.0], [0.0, 0.5], [1e-30, 1 - 6e-8]])
def test_saturated_gates(gate: list[float], skip: bool) -> None:
    where, (full, sparse, _) = TokenPositions.from_padding_mask(torch.arange(40)[None] >= 3), LAYOUTS["streaming"]
    check(where, full, sparse, make_inputs(where, gate), f"{gate}", skip=skip)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 24), (4, 16)])
def test_groups_dims_dtypes(group: int, head_dim: int, dtype: torch.dtype, eps: float) -> None:
    where, (full, sparse, _) = TokenPositions.causal(35, 35), LAYOUTS["streaming"]
    check(where, full, sparse, make_inputs(where, [0.3, 0.8], group, head_dim, dtype), f"group {group}", eps=eps)


@pytest.mark.parametrize("place", ["prefill", "chunk", "left", "packed", "holes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_disjoint_branches_read_each_key_once(
    layout: str, place: str, naive_mask: Callable[[AttentionLayout, TokenPositions], Tensor]
) -> None:
    """And together those of full attention."""
    where, (full, sparse, disjoint) = places()[place], LAYOUTS[layout]
    q = make_inputs(where, [0.5, 0.5])[0]
    problems = (problem_of(q, x, where, SCALE, True) for x in (full, sparse))
    branches = branches_of(*problems, None)
    assert branches.disjoint == disjoint
    if not disjoint:
        assert branches.wide.problem.layout == full
        return
    kept = branches.wide.problem.layout
    geometry = branches.wide.problem.geometry
    # Coordinates of the geometry, as the kernels compare them.
    keys = torch.arange(geometry.kv_len)[None] if geometry.k_pos is None else geometry.k_pos
    if geometry.is_closed_form:
        rows, start = torch.arange(geometry.q_len)[None] + geometry.offset, torch.tensor([[geometry.start]])
    else:
        rows, start = geometry.q_pos, geometry.q_start
    distance = rows[:, :, None] - keys[:, None]
    reads = (distance >= 0) & (distance < kept.max_distance) & (keys[:, None] >= start[:, :, None])
    reads = torch.nn.functional.pad(reads & (rows >= 0)[:, :, None], (branches.wide.first_key, 0))
    if geometry.empty_keys is not None:
        reads = reads & ~geometry.empty_keys[:, None]
    own, every = naive_mask(sparse, where)[:, 0], naive_mask(full, where)[:, 0]
    assert not bool((reads & own).any()) and torch.equal(reads | own, every)


def test_two_runs_give_the_same_bits() -> None:
    where, (full, sparse, _) = TokenPositions.causal(35, 35), LAYOUTS["streaming"]
    inputs = make_inputs(where, [0.3, 0.8], dtype=torch.float16)
    grad_out, found = torch.randn_like(inputs[0]), []
    for _ in range(2):
        out = mixed_attention(*inputs, full, sparse, positions=where, deterministic=True)
        found.append((out, *torch.autograd.grad(out, inputs, grad_out)))
    for name, first, second in zip(NAMES, *found, strict=True):
        assert torch.equal(first, second), name


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 20), (20, 0), (0, 0)])
def test_no_queries_or_no_keys(q_len: int, kv_len: int) -> None:
    where, (full, sparse, _) = TokenPositions.causal(q_len, kv_len, q_offset=kv_len), LAYOUTS["streaming"]
    inputs = make_inputs(where, [0.3, 0.8])
    out = mixed_attention(*inputs, full, sparse, positions=where)
    assert torch.equal(out, torch.zeros_like(inputs[0]))
    for grad, x in zip(torch.autograd.grad(out, inputs, torch.ones_like(out)), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_gradients_and_gates_in_any_memory_order() -> None:
    """`out.sum()` sends an expanded gradient, without strides at all; a gate may be a column of many."""
    where, (full, sparse, _) = TokenPositions.causal(25, 25), LAYOUTS["streaming"]
    *inputs, gate = make_inputs(where, [0.3, 0.8], group=1)
    column = torch.stack([gate.detach(), torch.full((2,), 9.0)], 1)[:, 0].requires_grad_()
    found = []
    for z, grad in ((gate, torch.ones_like(inputs[0])), (column, torch.ones(()).expand_as(inputs[0]))):
        out = mixed_attention(*inputs, z, full, sparse, positions=where)
        found.append((out, *torch.autograd.grad(out, [*inputs, z], grad)))
    assert column.stride() == (2,)
    for name, x, y in zip(NAMES, *found, strict=True):
        assert torch.equal(x, y), name


def test_results_lie_in_the_order_models_go_on_with() -> None:
    for layout, skip in (("streaming", False), ("two patterns", False), ("streaming", True)):
        where, (full, sparse, _) = TokenPositions.causal(25, 25), LAYOUTS[layout]
        inputs = make_inputs(where, [0.0, 0.8], group=1)
        out = mixed_attention(*inputs, full, sparse, positions=where, skip_saturated=skip)
        for name, x in zip(NAMES, (out, *torch.autograd.grad(out, inputs[:3], out)), strict=False):
            assert x.transpose(1, 2).is_contiguous(), f"{layout}: {name}"


def test_what_is_kept_for_the_backward_pass() -> None:
    """Nothing in fp32 but numbers per row, and nothing twice."""
    where, (full, sparse, _) = TokenPositions.causal(25, 25), LAYOUTS["streaming"]
    inputs = make_inputs(where, [0.3, 0.8], dtype=torch.float16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mixed_attention(*inputs, full, sparse, positions=where)
    elements, rows = inputs[0].numel(), inputs[0][..., 0].numel()
    assert sorted(x.numel() for x in kept if x.dtype == torch.float32) == [2, rows, rows]
    halves = [x.numel() for x in kept if x.dtype == torch.float16]
    assert sorted(halves) == sorted([*(x.numel() for x in inputs[:3]), elements, elements])


@pytest.mark.parametrize("disjoint", [False, True])
def test_the_blend_and_its_way_back(disjoint: bool) -> None:
    """The kernels alone, in fp64 arithmetic, with rows that have keys in one branch or in none."""
    wide, sparse, grad = torch.randn(3, 2, 4, 37, 24)
    lses = torch.randn(2, 2, 4, 37) * 5
    lses[0, :, :, ::5], lses[1, :, :, ::7] = float("-inf"), float("-inf")
    wide, sparse = (x.masked_fill(lse.isinf()[..., None], 0) for x, lse in zip((wide, sparse), lses, strict=True))
    gate = torch.tensor([0.3, 1.0], dtype=torch.float32)
    z = gate.double().repeat_interleave(2)[None, :, None]
    log_full = torch.logaddexp(*lses.double()) if disjoint else lses[0].double()
    share = (lses[0].double() - log_full).exp().nan_to_num(0) if disjoint else torch.ones(())
    rest = (lses[1].double() - log_full).exp().nan_to_num(0) if disjoint else torch.zeros(())
    full = share[..., None] * wide.double() + rest[..., None] * sparse.double()
    expected = z[..., None] * full + (1 - z[..., None]) * sparse.double()
    options = dict(disjoint=disjoint)
    found = blend(gate, wide, lses[0], sparse, lses[1], **options)
    assert_close_to_truth(found, expected, expected, eps=1e-6, name="blend")
    new_lses, deltas, slope = unblend(grad, gate, wide, lses[0], sparse, lses[1], **options)
    d_full, d_sparse = (grad.double() * full).sum(-1), (grad.double() * sparse.double()).sum(-1)
    expected = (d_full - d_sparse).unflatten(1, (2, 2)).sum((0, 2, 3))
    assert_close_to_truth(slope, expected, expected, eps=1e-5, name="gradient of the gate")
    # P * (dP - D) for any score: weights and deltas of the branch against those of the sum of both.
    score, d_p = torch.randn(2, 2, 4, 37).double()
    weight = [z * (score - log_full).exp(), (1 - z) * (score - lses[1].double()).exp()]
    weight = [x.masked_fill(lse.isinf(), 0) for x, lse in zip(weight, (log_full, lses[1]), strict=True)]
    in_both = weight[0] if disjoint else torch.zeros_like(weight[0])
    pairs = (
        (weight[0], weight[0] * (d_p - d_full)),
        (in_both + weight[1], in_both * (d_p - d_full) + weight[1] * (d_p - d_sparse)),
    )
    for n, (p, d_s) in enumerate(pairs):
        some = lses[n].isfinite()
        p_found = (score - new_lses[n].double()).exp().masked_fill(new_lses[n].isinf(), 0)
        for name, x, y in (("P", p_found, p), ("dS", p_found * (d_p - deltas[n].double()), d_s)):
            y = y.masked_fill(~some, 0)
            assert_close_to_truth(x, y, y, eps=2e-6, name=f"{name} of branch {n}")
