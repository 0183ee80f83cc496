"""The operators of compiled graphs: the same numbers as eager calls, and no compilation for another length."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import (
    AttentionLayout,
    Backend,
    BlockList,
    HeadPattern,
    TokenPositions,
    TracedPositions,
    layout_key,
    mixed_attention,
    register_backend,
    sparse_attention,
    sparse_attention_reference,
    unregister_backend,
)
from sparse_hf_kernels.sparse_attention import traced
from sparse_hf_kernels.sparse_attention.reference_backward import sparse_attention_backward_reference
from sparse_hf_kernels.sparse_attention.traced import layout_of, restored_positions

SCALE = 0.3
STREAMING = HeadPattern(window=6, num_sink_tokens=3)
BLOCKS = HeadPattern(blocks=BlockList(block_size=16, row_ptr=(0, 1, 1, 3, 5, 6, 7), indices=(0, 0, 2, 1, 3, 0, 5)))
LAYOUTS = {
    "mixed": AttentionLayout(patterns=(STREAMING, HeadPattern())),
    "blocks": AttentionLayout(patterns=(BLOCKS, STREAMING), max_distance=40, num_dense_rows=5),
    "both ways": AttentionLayout(patterns=(STREAMING, HeadPattern(window=9)), causal=False),
}


def make_inputs(
    q_len: int, kv_len: int | None = None, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = (4, q_len), (2, kv_len or q_len), (2, kv_len or q_len)
    return [torch.randn(batch, heads, n, 16).to(dtype).requires_grad_() for heads, n in shapes]


def padding(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor([[0], [length // 2]])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    for layout in LAYOUTS.values():
        layout_key(layout)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled() -> Iterator[Callable[[Callable], Callable]]:
    """`torch.compile` into one graph, where a second compilation is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda function: torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def assert_same(actual: Any, expected: Any, inputs: list[Tensor], rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Outputs and the gradients of the inputs through all of them."""
    actual, expected = ((x,) if isinstance(x, Tensor) else x for x in (actual, expected))
    sums = []
    for outs in (actual, expected):
        torch.manual_seed(3)
        sums.append(sum((out * torch.randn(out.shape))[out.isfinite()].sum() for out in outs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in sums), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["unpadded", "padded", "packed", "chunk"])
@pytest.mark.parametrize("which", ["both", "out", "lse"])
def test_the_reference_backward_is_what_autograd_finds(layout: str, place: str, which: str) -> None:
    positions = {
        "unpadded": TokenPositions.causal(70, 70),
        "padded": TokenPositions.from_padding_mask(padding(70)),
        "packed": TokenPositions.from_cu_seqlens(torch.tensor([0, 40, 41, 70])),
        "chunk": TokenPositions.causal(70, 90),
    }[place]
    inputs = make_inputs(70, positions.kv_len)
    options = {"positions": positions, "scale": SCALE}
    out, lse = sparse_attention_reference(*inputs, LAYOUTS[layout], **options)
    grad_out = torch.randn_like(out) if which != "lse" else None
    grad_lse = torch.randn_like(lse).masked_fill(lse.isinf(), float("nan")) if which != "out" else None
    total = torch.zeros(())
    if grad_out is not None:
        total = total + (out * grad_out).sum()
    if grad_lse is not None:
        total = total + (lse * grad_lse)[lse.isfinite()].sum()
    expected = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    detached = [x.detach() for x in (*inputs, out, lse)]
    found = sparse_attention_backward_reference(grad_out, grad_lse, *detached, LAYOUTS[layout], **options)
    for actual, true in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-5, atol=1e-5)


CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "default": lambda n: {},
    "closed form": lambda n: {"positions": TokenPositions.causal(n, n)},
    "offset": lambda n: {"q_offset": 2},
    "padded": lambda n: {"positions": TokenPositions.from_padding_mask(padding(n))},
    "packed": lambda n: {"positions": TokenPositions.from_cu_seqlens(torch.tensor([0, n // 3, n]))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_compiled_equals_eager(compiled: Callable, layout: str, call: str) -> None:
    """For several lengths with one compilation, whatever says where the tokens stand."""

    def attend(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # A linear map on either side: real graphs have neighbours that care for strides.
        out, lse = sparse_attention(q * 2, k, v, LAYOUTS[layout], scale=SCALE, return_lse=True, **kwargs)
        return out.transpose(1, 2).flatten(2) * 2, lse

    run = compiled(attend)
    for length in (50, 64, 33):
        inputs, kwargs = make_inputs(length), CALLS[call](length)
        assert_same(run(*inputs, kwargs), attend(*inputs, kwargs), inputs)


def test_cu_seqlens_of_another_number_of_sequences(compiled: Callable) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
        return sparse_attention(q, k, v, LAYOUTS["mixed"], cu_seqlens=borders)

    run = compiled(attend)
    for borders in ([0, 10, 33], [0, 5, 9, 9, 40], [0, 1, 2, 3, 50]):
        inputs = make_inputs(borders[-1], batch=1)
        assert_same(run(*inputs, torch.tensor(borders)), attend(*inputs, torch.tensor(borders)), inputs)


def test_the_fixture_notices_a_recompilation(compiled: Callable) -> None:
    run = compiled(lambda x, flag: x + 1 if flag else x)
    run(torch.ones(3), True)
    with pytest.raises(Exception, match="ecompil"):
        run(torch.ones(3), False)


NEW_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


@pytest.mark.parametrize(
    "known",
    [True, pytest.param(False, marks=pytest.mark.skipif(not NEW_TORCH, reason="dynamo of torch 2.11 cannot hash it"))],
)
def test_another_layout_is_not_mistaken(known: bool) -> None:
    """Whether or not `layout_key` was called before tracing."""
    first, second = (AttentionLayout(patterns=(HeadPattern(window=n), HeadPattern())) for n in (3, 4))
    for layout in (first, second) if known else ():
        layout_key(layout)
    holder = {"layout": first}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, holder["layout"])

    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(40)
    before = run(*inputs)
    holder["layout"] = second
    assert_same(run(*inputs), attend(*inputs), inputs)
    assert not torch.equal(run(*inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(compiled: Callable, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, LAYOUTS["mixed"])

    inputs = make_inputs(40, dtype=dtype)
    out = compiled(attend)(*inputs)
    assert out.dtype == dtype
    # Both round the fp32 gradients once; the output that the backward reads is rounded too.
    assert_same(out, attend(*inputs), inputs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dynamic", [False, True])
def test_deterministic_is_part_of_the_graph(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noting(*args: Any, deterministic: bool, **kwargs: Any) -> tuple[Tensor, Tensor]:
        asked.append(deterministic)
        return sparse_attention_reference(*args, **kwargs)

    register_backend(Backend(name="noting", refuses=lambda r: None, sparse_attention=noting, mixed_attention=noting))
    try:
        run = torch.compile(
            lambda q, k, v: sparse_attention(q, k, v, LAYOUTS["mixed"]), fullgraph=True, backend="eager"
        )
        inputs = make_inputs(9)
        run(*inputs)
        torch.use_deterministic_algorithms(dynamic)
        # A backend without a backward of its own gets the reference's.
        assert_same(run(*inputs), sparse_attention(*inputs, LAYOUTS["mixed"]), inputs)
        assert asked == [False, dynamic, dynamic]
    finally:
        torch.use_deterministic_algorithms(False)
        unregister_backend("noting")


@pytest.mark.parametrize("gate", [[0.3, 0.6], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
@pytest.mark.parametrize("skip_saturated", [False, True])
def test_mixed_attention(compiled: Callable, gate: list[float], skip_saturated: bool) -> None:
    full, sparse = AttentionLayout.dense(2), LAYOUTS["mixed"]
    layout_key(full)

    def mix(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        return mixed_attention(q, k, v, z, full, sparse, scale=SCALE, skip_saturated=skip_saturated)

    run = compiled(mix)
    z = torch.tensor(gate, requires_grad=True)
    for length in (20, 33):
        inputs = [*make_inputs(length), z]
        assert_same(run(*inputs), mix(*inputs), inputs, atol=1e-4)
    # Which heads are left out is decided when the graph runs.
    other = [*make_inputs(20), torch.tensor([0.5, 0.0], requires_grad=True)]
    assert_same(run(*other), mix(*other), other, atol=1e-4)


@pytest.mark.parametrize("place", ["closed form", "packed"])
def test_registration(place: str) -> None:
    """torch's own checks: schema, autograd, shapes and strides of the fake kernels, ahead-of-time tracing."""
    q, k, v = make_inputs(20, batch=1)
    packed = TokenPositions.from_cu_seqlens(torch.tensor([0, 7, 20]))
    tensors = (packed.q_positions, packed.k_positions, packed.q_segments, packed.k_segments, None, None, 0)
    where = (None, None, None, None, None, 0, 0) if place == "closed form" else tensors
    call = layout_key(LAYOUTS["mixed"]), *where, SCALE, False
    torch.library.opcheck(torch.ops.sparse_hf.sparse_attention, (q, k, v, *call))
    inputs = [x.detach() for x in (q, k, v)]
    out, lse = torch.ops.sparse_hf.sparse_attention(*inputs, *call)
    for grads in ((torch.randn_like(out), None), (torch.randn_like(out), torch.randn_like(lse))):
        torch.library.opcheck(torch.ops.sparse_hf.sparse_attention_backward, (*grads, *inputs, out, lse, *call))
    gate = torch.tensor([0.0, 0.7], requires_grad=True)
    for skip in (False, True):
        mixed_call = layout_key(AttentionLayout.dense(2)), call[0], *where, SCALE, skip, False
        torch.library.opcheck(torch.ops.sparse_hf.mixed_attention, (q, k, v, gate, *mixed_call))
        out, *kept = torch.ops.sparse_hf.mixed_attention(*inputs, gate.detach(), *mixed_call)
        backward_call = (torch.randn_like(out), *inputs, gate.detach(), *kept, *mixed_call)
        torch.library.opcheck(torch.ops.sparse_hf.mixed_attention_backward, backward_call)


def test_keys_of_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every process, so that a graph kept on disk can never mean another layout."""
    assert layout_key(AttentionLayout.dense(2)) == layout_key(AttentionLayout.dense(2)) == 25751408495881576
    keys = {layout_key(layout) for layout in (*LAYOUTS.values(), AttentionLayout.dense(2))}
    assert len(keys) == 4
    assert layout_of(layout_key(LAYOUTS["blocks"])) == LAYOUTS["blocks"]
    sent = pickle.loads(pickle.dumps(LAYOUTS["blocks"]))
    monkeypatch.setattr(traced, "_layouts", {})
    assert layout_of(layout_key(sent)) == LAYOUTS["blocks"], "what another process knows, this one learns"
    with pytest.raises(ValueError, match="layout 7 is unknown to this process"):
        layout_of(7)


def test_layers_share_what_is_derived_from_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_latest", None)
    q, k, _ = make_inputs(20)
    given = TokenPositions.from_padding_mask(padding(20))
    fields = TracedPositions.pack(given, 2)
    first, again = (restored_positions(q, k, (*fields, None, 0)) for _ in range(2))
    assert first is again and first.offset is None and first.q_segments is None
    assert torch.equal(first.k_positions, given.k_positions)
    closed = TracedPositions.pack(TokenPositions.causal(20, 20, q_offset=4, k_offset=3), 1)
    second = restored_positions(q, k, (*closed, None, 0))
    assert second is not first and (second.offset, second.k_offset) == (4, 3)
