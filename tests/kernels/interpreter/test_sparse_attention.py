"""The Triton kernels in Triton's interpreter against the reference: output, log-sum-exp and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, TokenPositions, sparse_attention_reference
from sparse_hf_kernels.dispatch import AttentionRequest
from sparse_hf_kernels.sparse_attention.autograd import fused_attention
from sparse_hf_kernels.sparse_attention.problem import AttentionProblem
from sparse_hf_kernels.sparse_attention.triton import KERNELS, refuses
from sparse_hf_kernels.sparse_attention.triton.configs import TileConfig
from sparse_hf_kernels.testing import assert_close_to_truth
from sparse_hf_kernels.tiles import RowGeometry

NAMES = ("out", "lse", "dq", "dk", "dv")
SCALE = 0.3


def blocks(num_rows: int, size: int, causal: bool) -> HeadPattern:
    mask = torch.rand(num_rows, num_rows, generator=torch.Generator().manual_seed(num_rows)) < 0.4
    return HeadPattern(blocks=BlockList.from_mask(mask.tril() if causal else mask, size))


def layouts(causal: bool) -> dict[str, AttentionLayout]:
    """Two KV heads each. Blocks of 32 are tiles in the interpreter's configuration, blocks of 8 are cut."""
    streaming, wide = HeadPattern(window=20, num_sink_tokens=3), HeadPattern(window=40, num_sink_tokens=18)
    exact, cut = blocks(5, 32, causal), blocks(20, 8, causal)
    made = {
        "dense": (HeadPattern(), HeadPattern()),
        "streaming": (streaming, wide),
        "mixed": (exact, wide),
        "cut": (cut, streaming),
    }
    found = {name: AttentionLayout(patterns=patterns, causal=causal) for name, patterns in made.items()}
    found["native window"] = AttentionLayout(patterns=(wide, exact), max_distance=30, causal=causal)
    if causal:
        found["dense rows"] = AttentionLayout(patterns=(streaming, exact), num_dense_rows=33)
        last = HeadPattern(window=20, num_sink_tokens=3, num_last_tokens=21)
        found["last rows"] = AttentionLayout(patterns=(last, exact))
        found["last rows, tiles"] = AttentionLayout(patterns=(wide, replace(last, num_last_tokens=32)))
        found["dense rows, cut"] = AttentionLayout(patterns=(wide, cut), num_dense_rows=40, max_distance=60)
    return found


def positions() -> dict[str, TokenPositions]:
    lengths, slots = torch.tensor([[60], [23], [1]]), torch.arange(60)
    holes = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.6
    return {
        "causal": TokenPositions.causal(96, 96),
        "ragged": TokenPositions.causal(65, 65),
        "chunk": TokenPositions.causal(37, 101),
        "dropped prefix": TokenPositions.causal(5, 60, k_offset=50),
        "one": TokenPositions.causal(1, 1),
        "left": TokenPositions.from_padding_mask(slots >= 60 - lengths),
        "right": TokenPositions.from_padding_mask(slots < lengths),
        "left chunk": TokenPositions.from_padding_mask(slots >= 60 - lengths, q_len=20),
        "holes": TokenPositions.from_padding_mask(holes),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 40, 41, 55, 100])),
        "nobody": TokenPositions.from_padding_mask(torch.zeros(1, 50, dtype=torch.bool)),
    }


def tensors(
    where: TokenPositions, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, strided: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of `[batch, length, heads, head_dim]` like a model's; NaN in slots of k and v without token."""
    batch = max(len(where.q_positions), len(where.k_positions))
    made = []
    for heads, at in (
        (num_heads, where.q_positions),
        (num_kv_heads, where.k_positions),
        (num_kv_heads, where.k_positions),
    ):
        x = torch.randn(batch, at.shape[1], heads, head_dim).to(dtype).transpose(1, 2)
        if heads == num_kv_heads and at is where.k_positions:
            x = x.masked_fill((at < 0)[:, None, :, None], float("nan"))
        made.append((x if strided else x.contiguous()).requires_grad_())
    return made[0], made[1], made[2]


def run(
    inputs: tuple[Tensor, Tensor, Tensor], layout: AttentionLayout, where: TokenPositions, grads: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and the gradients of q, k and v from the kernels."""
    problem = AttentionProblem(layout=layout, geometry=RowGeometry.of(where), scale=SCALE, deterministic=True)
    out, lse = fused_attention(KERNELS, *inputs, problem)
    return out, lse, *torch.autograd.grad((out, lse), inputs, grads)


def reference(
    inputs: tuple[Tensor, Tensor, Tensor], layout: AttentionLayout, where: TokenPositions, grads: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    out, lse = sparse_attention_reference(*inputs, layout, positions=where, scale=SCALE)
    # Where nobody reads a key, the log-sum-exp is a constant.
    outputs = (out, lse) if lse.requires_grad else (out,)
    return out, lse, *torch.autograd.grad(outputs, inputs, grads[: len(outputs)], materialize_grads=True)


def check(
    inputs: tuple[Tensor, Tensor, Tensor], layout: AttentionLayout, where: TokenPositions, name: str, eps: float
) -> None:
    q = inputs[0]
    has_key = reference_rows(layout, where, q)
    # Rows without key take any gradient of the log-sum-exp, which is -inf there, for 0.
    grad_lse = torch.randn(q.shape[:3]).masked_fill(~has_key, float("nan"))
    grad_out = torch.randn_like(q)
    found = run(inputs, layout, where, (grad_out, grad_lse))
    exact = tuple(x.detach().float().requires_grad_() for x in inputs)
    truth = reference(exact, layout, where, (grad_out.float(), grad_lse.nan_to_num()))
    for what, x, y in zip(NAMES, found, truth, strict=True):
        assert x.shape == y.shape and x.dtype == (torch.float32 if what == "lse" else q.dtype)
        assert torch.equal(x.isinf(), y.isinf()), f"{name}: {what}: rows without key"
        x, y = x.masked_fill(x.isinf(), 0), y.masked_fill(y.isinf(), 0)
        assert_close_to_truth(x, y, y, eps=eps, name=f"{name}: {what}")


def reference_rows(layout: AttentionLayout, where: TokenPositions, q: Tensor) -> Tensor:
    """Boolean `[batch, num_heads, q_len]`: rows that read some key."""
    i, j = where.q_positions[:, :, None], where.k_positions[:, None, :]
    visible = where.visible(slice(None))
    last = j.expand_as(visible).masked_fill(~visible, -1).amax(-1, keepdim=True)
    rows = torch.stack([(visible & layout.allowed(p, i, j, last)).any(-1) for p in layout.patterns], 1)
    return rows.repeat_interleave(q.shape[1] // layout.num_kv_heads, 1).expand(len(q), -1, -1)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("place", positions())
def test_kernels_compute_the_layout(place: str, causal: bool) -> None:
    where = positions()[place]
    for name, layout in layouts(causal).items():
        check(tensors(where, 2, 2, 16, torch.float32), layout, where, name, 1e-5)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("strided", [True, False], ids=["strided", "contiguous"])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float16, 1.5e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 24), (4, 16)])
def test_groups_dims_dtypes_strides(group: int, head_dim: int, dtype: torch.dtype, eps: float, strided: bool) -> None:
    where = TokenPositions.causal(50, 70)
    layout = layouts(True)["mixed"]
    check(tensors(where, 2 * group, 2, head_dim, dtype, strided), layout, where, f"group {group}", eps)


@pytest.mark.usefixtures("poison_empty")
def test_two_runs_give_the_same_bits() -> None:
    where, layout = TokenPositions.causal(40, 70), layouts(True)["cut"]
    inputs = tensors(where, 4, 2, 16, torch.float16)
    grads = (torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3]))
    for name, first, second in zip(
        NAMES, run(inputs, layout, where, grads), run(inputs, layout, where, grads), strict=True
    ):
        assert torch.equal(first, second), name


@pytest.mark.usefixtures("poison_empty")
def test_padded_queries_reach_nothing() -> None:
    """Rows without token sit in full blocks too: whatever their output gradient, nobody else's gradient moves."""
    slots = torch.arange(75)
    where = TokenPositions.from_padding_mask(slots < torch.tensor([[75], [30]]))
    layout = layouts(True)["dense"]
    inputs = tensors(where, 2, 2, 16, torch.float32)
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.zeros(inputs[0].shape[:3])
    loud = torch.where((where.q_positions < 0)[:, None, :, None], 1e6, grad_out)
    quiet = run(inputs, layout, where, (grad_out, grad_lse))
    for name, x, y in zip(NAMES, run(inputs, layout, where, (loud, grad_lse)), quiet, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 20), (20, 0), (0, 0)])
def test_no_queries_or_no_keys(q_len: int, kv_len: int) -> None:
    where = TokenPositions.causal(q_len, kv_len, q_offset=kv_len)
    inputs = tensors(where, 4, 2, 16, torch.float32)
    grads = (torch.ones(1, 4, q_len, 16), torch.ones(1, 4, q_len))
    out, lse, *found = run(inputs, layouts(True)["streaming"], where, grads)
    assert torch.equal(out, torch.zeros(1, 4, q_len, 16)) and torch.equal(lse, torch.full((1, 4, q_len), -torch.inf))
    for x, y in zip(found, inputs, strict=True):
        assert torch.equal(x, torch.zeros_like(y))


def test_gradients_in_any_memory_order() -> None:
    """`out.sum()` sends an expanded gradient, without strides at all."""
    where, layout = TokenPositions.causal(40, 40), layouts(True)["streaming"]
    inputs = tensors(where, 2, 2, 16, torch.float32)
    ones = torch.ones(())
    expanded = run(inputs, layout, where, (ones.expand_as(inputs[0]), ones.expand(inputs[0].shape[:3])))
    plain = run(inputs, layout, where, (torch.ones_like(inputs[0]), torch.ones(inputs[0].shape[:3])))
    for name, x, y in zip(NAMES, expanded, plain, strict=True):
        assert torch.equal(x, y), name


def test_results_lie_in_the_order_models_go_on_with() -> None:
    where, layout = TokenPositions.causal(20, 20), layouts(True)["dense"]
    q, k, v = tensors(where, 2, 2, 16, torch.float32)
    found = run((q, k, v), layout, where, (torch.ones_like(q), torch.zeros(q.shape[:3])))
    for name, x in zip(NAMES, found, strict=True):
        assert (x if name == "lse" else x.transpose(1, 2)).is_contiguous(), name


def test_a_scale_that_is_not_positive_raises() -> None:
    where = TokenPositions.causal(4, 4)
    problem = AttentionProblem(
        layout=layouts(True)["dense"], geometry=RowGeometry.of(where), scale=0.0, deterministic=True
    )
    with pytest.raises(ValueError, match="positive scale"):
        fused_attention(KERNELS, *tensors(where, 2, 2, 16, torch.float32), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, None),
        (torch.float16, 256, None),
        (torch.bfloat16, 64, "bfloat16"),
        (torch.float64, 64, "float64"),
        (torch.float16, 320, "head_dim 320 exceeds 256"),
    ],
)
def test_refusals(dtype: torch.dtype, head_dim: int, reason: str | None) -> None:
    refusal = refuses(AttentionRequest(op="sparse_attention", device_type="cpu", dtype=dtype, head_dim=head_dim))
    assert refusal is None if reason is None else refusal is not None and reason in refusal


@pytest.mark.parametrize(
    ("block_size", "shape"), [(128, (128, 64)), (64, (64, 64)), (96, (32, 32)), (48, (128, 64)), (16, (128, 64))]
)
def test_tiles_fit_the_blocks_of_a_list(block_size: int, shape: tuple[int, int]) -> None:
    assert TileConfig(128, 64, 8, 3).within(block_size)[:2] == shape
