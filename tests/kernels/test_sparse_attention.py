"""`sparse_attention` against one softmax over a dense mask in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, TokenPositions, sparse_attention
from sparse_hf_kernels.sparse_attention import dense_rows
from sparse_hf_kernels.testing import assert_close_to_truth

HEAD_DIM = 16
SCALE = 0.3


def block_list(num_rows: int, block_size: int, causal: bool = True) -> BlockList:
    mask = torch.rand(num_rows, num_rows, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[1] = False
    return BlockList.from_mask(mask.tril() if causal else mask, block_size)


WINDOW = HeadPattern(window=5)
STREAMING = HeadPattern(window=20, num_sink_tokens=3)
EXPLICIT = HeadPattern(blocks=block_list(19, 16))
LAYOUTS = {
    "dense": AttentionLayout.dense(2),
    "window": AttentionLayout(patterns=(WINDOW, WINDOW)),
    "streaming": AttentionLayout(patterns=(STREAMING, STREAMING)),
    "explicit": AttentionLayout(patterns=(EXPLICIT, EXPLICIT)),
    "mixed": AttentionLayout(patterns=(EXPLICIT, HeadPattern())),
    "native window": AttentionLayout(patterns=(STREAMING, EXPLICIT), max_distance=11),
    "dense rows": AttentionLayout(patterns=(STREAMING, EXPLICIT), max_distance=40, num_dense_rows=30),
}
BOTH_WAYS = {
    "dense": AttentionLayout.dense(2, causal=False),
    "streaming": AttentionLayout(patterns=(STREAMING, WINDOW), causal=False),
    "explicit": AttentionLayout(
        patterns=(HeadPattern(blocks=block_list(19, 16, causal=False)), STREAMING), causal=False
    ),
    "native window": AttentionLayout(patterns=(STREAMING, HeadPattern()), max_distance=11, causal=False),
}
LENGTHS = (1, 2, 63, 64, 65, 257, 300)


def make_inputs(
    q_len: int, kv_len: int | None = None, *, batch: int = 2, group: int = 2, num_kv_heads: int = 2, scale: float = 1.0
) -> list[Tensor]:
    shapes = (num_kv_heads * group, q_len), (num_kv_heads, kv_len or q_len), (num_kv_heads, kv_len or q_len)
    return [(torch.randn(batch, heads, n, HEAD_DIM) * scale).requires_grad_() for heads, n in shapes]


def assert_equals_naive(
    naive: Callable, inputs: list[Tensor], layout: AttentionLayout, positions: TokenPositions | None = None
) -> None:
    """Output, log-sum-exp and the gradients of q, k and v through both."""
    q, k, _ = inputs
    where = positions or TokenPositions.causal(q.shape[2], k.shape[2])
    out, lse = sparse_attention(*inputs, layout, positions=positions, scale=SCALE, return_lse=True)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    true_out, true_lse = naive(*doubles, layout, where, SCALE)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    assert_close_to_truth(out.detach(), true_out.detach(), true_out.detach(), eps=2e-6, name="out")
    some = true_lse.isfinite()
    assert bool((out.detach()[~some] == 0).all())
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out * weight).sum() + (lse * lse_weight)[some].sum(), inputs)
    truth = torch.autograd.grad((true_out * weight).sum() + (true_lse * lse_weight)[some].sum(), doubles)
    for name, grad, true in zip("qkv", grads, truth, strict=True):
        assert_close_to_truth(grad, true, true, eps=5e-6, name=f"gradient of {name}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_naive(naive: Callable, layout: str, length: int) -> None:
    assert_equals_naive(naive, make_inputs(length), LAYOUTS[layout])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_grouped_queries(naive: Callable, group: int, num_kv_heads: int) -> None:
    patterns = (STREAMING, EXPLICIT, HeadPattern())[:num_kv_heads]
    inputs = make_inputs(70, group=group, num_kv_heads=num_kv_heads)
    assert_equals_naive(naive, inputs, AttentionLayout(patterns=patterns))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 65), (7, 300), (64, 65), (1, 1), (257, 300)])
@pytest.mark.parametrize("layout", ["mixed", "dense rows", "native window"])
def test_queries_are_the_last_of_the_keys(naive: Callable, layout: str, q_len: int, kv_len: int) -> None:
    assert_equals_naive(naive, make_inputs(q_len, kv_len), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding(naive: Callable, layout: str, side: str) -> None:
    lengths = torch.tensor([[70], [33], [1]])
    slots = torch.arange(70)
    mask = {"left": slots >= 70 - lengths, "right": slots < lengths, "holes": torch.rand(3, 70) < 0.6}[side]
    assert_equals_naive(naive, make_inputs(70, batch=3), LAYOUTS[layout], TokenPositions.from_padding_mask(mask))
    chunk = TokenPositions.from_padding_mask(mask, q_len=9)
    assert_equals_naive(naive, make_inputs(9, 70, batch=3), LAYOUTS[layout], chunk)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing(naive: Callable, layout: str) -> None:
    positions = TokenPositions.from_cu_seqlens(torch.tensor([0, 40, 41, 300, 370]))
    assert positions.max_seq_len == 259
    assert_equals_naive(naive, make_inputs(370, batch=1), LAYOUTS[layout], positions)


@pytest.mark.parametrize("layout", BOTH_WAYS)
@pytest.mark.parametrize("place", ["unpadded", "padded", "packed", "a few queries"])
def test_without_causality(naive: Callable, layout: str, place: str) -> None:
    q_len, mask = 70, torch.arange(70) >= torch.tensor([[0], [33]])
    positions = {
        "unpadded": None,
        "padded": TokenPositions.from_padding_mask(mask),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 40, 41, 70])),
        "a few queries": TokenPositions.causal(9, 70, q_offset=20),
    }[place]
    q_len = 9 if place == "a few queries" else 70
    assert_equals_naive(naive, make_inputs(q_len, 70), BOTH_WAYS[layout], positions)


def test_causality_is_what_the_layout_says() -> None:
    """Same patterns: only the layout that is not causal changes when a later key does."""
    q, k, v = make_inputs(20)
    changed = k.detach().clone()
    changed[:, :, -1] += 1.0
    for causal in (True, False):
        layout = AttentionLayout.dense(2, causal=causal)
        same = sparse_attention(q, k, v, layout)[:, :, :-1] == sparse_attention(q, changed, v, layout)[:, :, :-1]
        assert bool(same.all()) == causal


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cu_seqlens_and_q_offset_are_positions(layout: str) -> None:
    borders = torch.tensor([0, 40, 41, 41, 70], dtype=torch.int32)
    inputs = make_inputs(70, batch=1)
    packed = sparse_attention(*inputs, LAYOUTS[layout], cu_seqlens=borders)
    assert torch.equal(
        packed, sparse_attention(*inputs, LAYOUTS[layout], positions=TokenPositions.from_cu_seqlens(borders.long()))
    )
    for begin, end in ((0, 40), (40, 41), (41, 70)):
        alone = sparse_attention(*(x[:, :, begin:end] for x in inputs), LAYOUTS[layout])
        torch.testing.assert_close(packed[:, :, begin:end], alone, rtol=1e-5, atol=1e-6)
    q, k, v = make_inputs(70)
    whole = sparse_attention(q, k, v, LAYOUTS[layout])
    chunk = sparse_attention(q[:, :, 20:33], k, v, LAYOUTS[layout], q_offset=20)
    torch.testing.assert_close(chunk, whole[:, :, 20:33], rtol=1e-5, atol=1e-6)


def test_positions_are_given_once() -> None:
    q, k, v = make_inputs(8, batch=1)
    ways = {"positions": TokenPositions.causal(8, 8), "cu_seqlens": torch.tensor([0, 8]), "q_offset": 0}
    for left_out in ways:
        two = {name: value for name, value in ways.items() if name != left_out}
        with pytest.raises(ValueError, match="at most one of positions, cu_seqlens and q_offset"):
            sparse_attention(q, k, v, LAYOUTS["mixed"], **two)


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0, 7], "must ascend from 0 to the 8 tokens"),
        ([1, 8], "must ascend from 0"),
        ([0, 5, 3, 8], r"must ascend .* got \[0, 5, 3, 8\]"),
        ([0, *range(1, 20), 8], r"got \[0, 1, 2, 3, ..., 8\]"),
        ([0], r"integers \[num_sequences \+ 1\]"),
        ([0.0, 8.0], "must be integers"),
        ([[0, 8]], "must be integers"),
    ],
)
def test_wrong_cu_seqlens(borders: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_attention(*make_inputs(8, batch=1), LAYOUTS["mixed"], cu_seqlens=torch.tensor(borders))


def test_cu_seqlens_pack_one_row_of_queries_with_their_keys() -> None:
    for inputs in (make_inputs(8, batch=2), make_inputs(4, 8, batch=1)):
        with pytest.raises(ValueError, match="one row of as many queries as keys"):
            sparse_attention(*inputs, LAYOUTS["mixed"], cu_seqlens=torch.tensor([0, 8]))


def test_no_heads_and_no_dimensions() -> None:
    q, k, v = make_inputs(8)
    with pytest.raises(ValueError, match="shared out over 0 KV heads"):
        sparse_attention(q, k[:, :0], v[:, :0], LAYOUTS["mixed"])
    with pytest.raises(ValueError, match="head_dim 0"):
        sparse_attention(q[..., :0], k[..., :0], v[..., :0], LAYOUTS["mixed"])


def test_queries_of_a_padding_mask_are_among_its_keys() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert TokenPositions.from_padding_mask(mask, q_len=0).q_len == 0
    with pytest.raises(ValueError, match="the last of 5 keys, got q_len 9"):
        TokenPositions.from_padding_mask(mask, q_len=9)


def test_offsets_count_from_0() -> None:
    with pytest.raises(ValueError, match="count from 0, got q_offset -1"):
        sparse_attention(*make_inputs(8), LAYOUTS["mixed"], q_offset=-1)


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan")])
def test_the_scale_is_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        sparse_attention(*make_inputs(8), LAYOUTS["mixed"], scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_changes_nothing_on_the_reference(layout: str) -> None:
    inputs = make_inputs(65)
    outs = [sparse_attention(*inputs, LAYOUTS[layout], deterministic=value) for value in (True, False)]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    assert torch.equal(*outs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("layout", ["mixed", "streaming"])
def test_order_in_memory_does_not_matter(layout: str) -> None:
    """Positions say where tokens stand: permuted queries and keys give permuted outputs (evicted caches rely on it)."""
    q, k, v = make_inputs(66)
    there, back = torch.randperm(66), torch.randperm(66)
    positions = TokenPositions(q_positions=there[None], k_positions=back[None])
    expected = sparse_attention(q, k, v, LAYOUTS[layout])
    permuted = sparse_attention(q[:, :, there], k[:, :, back], v[:, :, back], LAYOUTS[layout], positions=positions)
    torch.testing.assert_close(permuted, expected[:, :, there], rtol=1e-5, atol=1e-5)


def test_rows_without_keys() -> None:
    """An empty block row, and a call in which nobody has a key: output 0, log-sum-exp -inf, gradients exactly 0."""
    empty = AttentionLayout(patterns=(HeadPattern(blocks=BlockList(block_size=16, row_ptr=(0, 1, 1), indices=(0,))),))
    inputs = make_inputs(32, num_kv_heads=1)
    out, lse = sparse_attention(*inputs, empty, return_lse=True)
    assert bool((out[:, :, 16:] == 0).all()) and bool((lse[:, :, 16:] == float("-inf")).all())
    assert bool((out[:, :, :16] != 0).any()) and bool(lse[:, :, :16].isfinite().all())
    for grad in torch.autograd.grad(out[:, :, 16:].sum(), inputs, retain_graph=True):
        assert bool((grad == 0).all())
    grad_q, *grads = torch.autograd.grad(out.square().sum(), inputs)
    assert bool((grad_q[:, :, 16:] == 0).all()) and all(bool(grad.isfinite().all()) for grad in (grad_q, *grads))

    nothing = TokenPositions.from_padding_mask(torch.zeros(2, 32))
    out, lse = sparse_attention(*inputs, empty, positions=nothing, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == float("-inf")).all())
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert bool((grad == 0).all())


def test_no_queries() -> None:
    q, k, v = make_inputs(0, 5)
    out, lse = sparse_attention(q, k, v, LAYOUTS["mixed"], return_lse=True)
    assert out.shape == (2, 4, 0, HEAD_DIM) and lse.shape == (2, 4, 0)
    for grad in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)):
        assert bool((grad == 0).all())


def test_no_keys() -> None:
    q, k, v = make_inputs(5)
    k, v = k[:, :, :0], v[:, :, :0]
    out, lse = sparse_attention(q, k, v, LAYOUTS["mixed"], q_offset=0, return_lse=True)
    assert out.shape == q.shape and bool((out == 0).all()) and bool((lse == float("-inf")).all())
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert bool((grad == 0).all())


def test_nothing_is_computed_without_queries_or_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_hf_kernels.sparse_attention import eager

    monkeypatch.setattr(eager, "select_backend", None)
    q, k, v = make_inputs(3)
    for inputs in ((q[:, :, :0], k, v), (q[:0], k[:0], v[:0])):
        assert sparse_attention(*inputs, LAYOUTS["mixed"]).numel() == 0
    with pytest.raises(TypeError):
        sparse_attention(q, k, v, LAYOUTS["mixed"])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["dense", "mixed"])
def test_what_lies_in_empty_slots_is_never_read(layout: str, poison: float) -> None:
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :13] = mask[1, 35:] = False
    positions = TokenPositions.from_padding_mask(mask)
    q, k, v = make_inputs(40)
    expected = sparse_attention(q, k, v, LAYOUTS[layout], positions=positions)
    bad = [x.detach().masked_fill(~mask[:, None, :, None], poison).requires_grad_() for x in (k, v)]
    out = sparse_attention(q, *bad, LAYOUTS[layout], positions=positions)
    assert torch.equal(out, expected)
    weight = torch.randn_like(out)
    poisoned = torch.autograd.grad((out * weight).sum(), (q, *bad))
    clean = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


@pytest.mark.parametrize("scale", [100.0, 0.001, 0.0])
@pytest.mark.parametrize("layout", ["mixed", "native window"])
def test_extreme_inputs(naive: Callable, layout: str, scale: float) -> None:
    inputs = make_inputs(65, scale=scale)
    out, lse = sparse_attention(*inputs, LAYOUTS[layout], scale=SCALE, return_lse=True)
    true_out, true_lse = naive(*(x.detach() for x in inputs), LAYOUTS[layout], TokenPositions.causal(65, 65), SCALE)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    assert_close_to_truth(out.detach(), true_out, true_out, eps=1e-3 if scale > 1 else 2e-6, name="out")
    for grad in torch.autograd.grad(out.sum() + lse[true_lse.isfinite()].sum(), inputs):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(naive: Callable, layout: str, dtype: torch.dtype) -> None:
    """No worse than the same computation all in half precision, which rounds scores and probabilities too."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in make_inputs(70)]
    positions = TokenPositions.causal(70, 70)
    out, lse = sparse_attention(*inputs, LAYOUTS[layout], scale=SCALE, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    results = {"tested": (out, inputs)}
    for name, precision in (("same", dtype), ("truth", torch.float64)):
        copies = [x.detach().to(precision).requires_grad_() for x in inputs]
        results[name] = naive(*copies, LAYOUTS[layout], positions, SCALE, precision)[0], copies
    weight = torch.randn(out.shape).to(dtype)
    gradients = {name: torch.autograd.grad((x * weight.to(x.dtype)).sum(), xs) for name, (x, xs) in results.items()}
    assert_close_to_truth(*(results[name][0].detach() for name in ("tested", "same", "truth")), eps=1e-5, name="out")
    for n, name in enumerate("qkv"):
        tested, same, truth = (gradients[key][n] for key in ("tested", "same", "truth"))
        assert tested.dtype == dtype
        assert_close_to_truth(tested, same, truth, eps=1e-3, name=f"gradient of {name}")


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(40)
    expected = sparse_attention(*inputs, LAYOUTS["mixed"])
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(*inputs, LAYOUTS["mixed"])
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_default_scale() -> None:
    inputs = make_inputs(20)
    assert torch.equal(
        sparse_attention(*inputs, LAYOUTS["mixed"]), sparse_attention(*inputs, LAYOUTS["mixed"], scale=HEAD_DIM**-0.5)
    )


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (zeros(4, 8, 16), zeros(1, 2, 8, 16), zeros(1, 2, 8, 16), r"must be \[batch, heads, length, head_dim\]"),
        (zeros(2, 4, 8, 16), zeros(1, 2, 8, 16), zeros(1, 2, 8, 16), "must agree"),
        (zeros(1, 4, 8, 16), zeros(1, 2, 8, 16), zeros(1, 2, 9, 16), "must agree"),
        (zeros(1, 4, 8, 16), zeros(1, 2, 8, 8), zeros(1, 2, 8, 16), "must agree"),
        (zeros(1, 5, 8, 16), zeros(1, 2, 8, 16), zeros(1, 2, 8, 16), "5 query heads cannot be shared out over 2"),
        (zeros(1, 4, 8, 16), zeros(1, 4, 8, 16), zeros(1, 4, 8, 16), "the layout describes 2 KV heads, k has 4"),
        (zeros(1, 4, 8, 16), zeros(1, 2, 8, 16), zeros(1, 2, 8, 16, dtype=torch.float16), "share one floating dtype"),
        (*(zeros(1, n, 8, 16, dtype=torch.int32) for n in (4, 2, 2)), "share one floating dtype"),
        (zeros(1, 4, 8, 16), zeros(1, 2, 8, 16).to("meta"), zeros(1, 2, 8, 16), "one device"),
        (zeros(1, 4, 9, 16), zeros(1, 2, 8, 16), zeros(1, 2, 8, 16), "q_len <= kv_len"),
        (zeros(1, 4, 1, 16), zeros(1, 2, 305, 16), zeros(1, 2, 305, 16), "covers 304 tokens, got a sequence of 305"),
    ],
)
def test_inputs_that_do_not_fit(q: Tensor, k: Tensor, v: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, LAYOUTS["mixed"])


def test_positions_that_do_not_fit() -> None:
    q, k, v = make_inputs(8)
    for q_len, kv_len in ((7, 8), (8, 9)):
        positions = TokenPositions.causal(q_len, kv_len)
        with pytest.raises(ValueError, match=r"_positions must be \[2 or 1, 8\]"):
            sparse_attention(q, k, v, LAYOUTS["mixed"], positions=positions)
    with pytest.raises(ValueError, match="q_positions must be"):
        sparse_attention(q, k, v, LAYOUTS["mixed"], positions=TokenPositions.from_padding_mask(torch.ones(3, 8)))
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        TokenPositions(q_positions=torch.arange(8), k_positions=torch.arange(8)[None])
    with pytest.raises(ValueError, match="together"):
        TokenPositions(
            q_positions=torch.arange(8)[None], k_positions=torch.arange(8)[None], q_segments=torch.zeros(1, 8)
        )


def test_an_explicit_pattern_counts_positions() -> None:
    """Longer tensors than the pattern serve, longer sequences do not, whatever their tensors' length."""
    layout = AttentionLayout(patterns=(HeadPattern(blocks=block_list(2, 16)),))
    q, k, v = make_inputs(64, batch=1, num_kv_heads=1)
    packed = TokenPositions.from_cu_seqlens(torch.tensor([0, 32, 64]))
    assert sparse_attention(q, k, v, layout, positions=packed).shape == q.shape
    late = TokenPositions(q_positions=torch.tensor([[32]]), k_positions=torch.tensor([[31, 32]]))
    with pytest.raises(ValueError, match="covers 32 tokens, got a sequence of 33"):
        sparse_attention(q[:, :, :1], k[:, :, :2], v[:, :, :2], layout, positions=late)


def test_tolerance_helper_can_fail() -> None:
    truth = torch.randn(100)
    assert_close_to_truth(truth + 1e-7, truth, truth, eps=1e-6, name="x")
    for wrong in (truth * 1.01, torch.full_like(truth, float("nan"))):
        with pytest.raises(AssertionError, match="x: relative error"):
            assert_close_to_truth(wrong, truth, truth, eps=1e-6, name="x")


@pytest.mark.parametrize("q_offset", [0, 3, 10, 14])
def test_dense_rows_of_unpadded_calls(q_offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls over and after the border of the dense rows agree with the pairs that the layout allows."""
    called = []

    def watched(*args: Any) -> Any:
        called.append(args[3].num_dense_rows)
        return attend(*args)

    attend = dense_rows.attend
    monkeypatch.setattr(dense_rows, "attend", watched)
    mask = torch.ones(5, 5).tril().bool()
    mask[2:, 1] = False
    layout = AttentionLayout(
        patterns=(HeadPattern(blocks=BlockList.from_mask(mask, block_size=4)), HeadPattern(window=3)),
        num_dense_rows=11,
    )
    q = torch.randn(2, 4, 20 - q_offset, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(2))
    out, lse = sparse_attention(q, k, v, layout, return_lse=True)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    rows, keys = torch.arange(q_offset, 20)[:, None], torch.arange(20)[None]
    allowed = torch.stack([layout.allowed(pattern, rows, keys) for pattern in layout.patterns])
    scores = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT) * 8**-0.5
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1).flatten(1, 2))
    for grad, right in zip(grads, torch.autograd.grad(expected.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, right)
    assert called == ([0, 0] if layout.num_dense_rows > q_offset else [0])
