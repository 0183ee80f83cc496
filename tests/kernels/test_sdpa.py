"""Short dense calls: which of them go to PyTorch's own attention, and that it computes the same."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import (
    AttentionLayout,
    AttentionRequest,
    Backend,
    BlockList,
    HeadPattern,
    TokenPositions,
    backends,
    dispatch,
    mixed_attention,
    register_backend,
    select_backend,
    sparse_attention,
    sparse_attention_reference,
    unregister_backend,
)
from sparse_hf_kernels.sparse_attention import op, sdpa

VARIABLE = "SPARSE_HF_BACKEND"
DENSE = AttentionLayout.dense(2)
HOPPER = AttentionRequest(
    op="sparse_attention", device_type="cuda", dtype=torch.bfloat16, head_dim=128, capability=(9, 0), num_rows=32,
    dense_len=1024, needs_lse=False,
)  # fmt: skip


def pattern(*patterns: HeadPattern, **kwargs: Any) -> AttentionLayout:
    return AttentionLayout(patterns=patterns, **kwargs)


def block_list() -> BlockList:
    return BlockList(block_size=8, row_ptr=(0, 0, 1, 2), indices=(0, 0))


@pytest.mark.parametrize(
    "layout",
    [
        DENSE,
        pattern(HeadPattern(window=9), HeadPattern()),
        pattern(HeadPattern(window=9, num_sink_tokens=3), HeadPattern(window=14)),
        pattern(HeadPattern(window=9, num_sink_tokens=3), max_distance=10),
        pattern(HeadPattern(window=3), num_dense_rows=11),
        pattern(HeadPattern(window=3, num_sink_tokens=2, num_last_tokens=4), HeadPattern()),
        pattern(HeadPattern(window=3, num_last_tokens=4), HeadPattern(num_last_tokens=4), num_dense_rows=7),
        pattern(HeadPattern(blocks=block_list()), HeadPattern(window=12), num_dense_rows=6),
        AttentionLayout.dense(2, max_distance=7),
    ],
)
def test_the_length_up_to_which_a_layout_is_dense(layout: AttentionLayout) -> None:
    """By counting the keys of every query."""

    def is_dense(length: int) -> bool:
        whole = torch.arange(1, length + 1)
        return all(torch.equal(layout.row_counts(p, length), whole) for p in layout.patterns)

    for length in range(1, 24):
        assert is_dense(length) == (length <= layout.dense_len), length


def test_layouts_that_are_never_dense() -> None:
    assert AttentionLayout.dense(2, causal=False).dense_len == 0
    assert pattern(HeadPattern(selected=True), num_dense_rows=100).dense_len == 0


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dense_len": 3583}, True),
        ({"dense_len": 3584}, False),
        ({"head_dim": 64, "dense_len": 4095}, True),
        ({"head_dim": 64, "dense_len": 4096}, False),
        ({"num_rows": 128, "dense_len": 1791}, True),
        ({"num_rows": 128, "dense_len": 1792}, False),
        ({"num_rows": 8, "dense_len": 7167}, True),
        ({"dense_len": None}, False),
        ({"dense_len": None, "layout": DENSE}, False),
        ({"needs_lse": True}, False),
        ({"deterministic": True}, False),
        ({"op": "mixed_attention"}, False),
        ({"value_dim": 64}, False),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 256}, False),
        ({"capability": (8, 0)}, False),
    ],
)
def test_the_decision(changes: dict[str, Any], chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_warn_of_compiler", lambda *args: None)
    # Whatever follows takes the rest.
    monkeypatch.setattr(dispatch, "_built_in", lambda: (backends.SDPA, backends.REFERENCE))
    assert select_backend(replace(HOPPER, **changes)).backend.name == ("sdpa" if chosen else "reference")


def test_a_cpu_does_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    request = replace(HOPPER, device_type="cpu", capability=None)
    assert backends.SDPA.refuses(request) is None
    assert "no break-even length is measured" in select_backend(request).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"needs_lse": True}, "returns no log-sum-exp"),
        ({"deterministic": True}, "no fixed order"),
        ({"dense_len": None}, "whole unpadded sequences shorter than 3584 tokens"),
        ({"op": "mixed_attention"}, "has no mixed_attention"),
        ({"value_dim": 64}, "head_dim 128, got 64"),
    ],
)
def test_what_it_refuses_when_forced(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sdpa")
    assert select_backend(replace(HOPPER, dense_len=2**20)).backend.name == "sdpa"
    with pytest.raises(ValueError, match=f"'sdpa' cannot serve {changes.get('op', 'sparse_attention')}: .*{reason}"):
        select_backend(replace(HOPPER, **changes))


def inputs(length: int = 40, heads: int = 4, kv_heads: int = 2, dim: int = 16, q_len: int = 0) -> list[Tensor]:
    shapes = ((heads, q_len or length), *[(kv_heads, length)] * 2)
    return [torch.randn(2, tokens, n, dim).transpose(1, 2).requires_grad_() for n, tokens in shapes]


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The lengths of calls that PyTorch's attention was given; the backend is forced."""
    lengths: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(q.shape[2])
        return original(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setenv(VARIABLE, "sdpa")
    yield lengths


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a wider last dimension."""
    return torch.stack((x, torch.full_like(x, 7.0)), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    "change", [lambda x: x, strided, torch.Tensor.contiguous], ids=["projection", "strided", "own"]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equal_to_the_reference(
    heads: int, change: Callable[[Tensor], Tensor], scale: float | None, sdpa_calls: list[int]
) -> None:
    """Output and gradients, with and without grouped queries."""
    given = inputs(heads=heads)
    grad = torch.randn(2, heads, 40, 16)
    window = pattern(HeadPattern(window=40), HeadPattern(window=37, num_sink_tokens=3))
    positions = TokenPositions.causal(40, 40)
    truth, _ = sparse_attention_reference(*given, DENSE, positions=positions, scale=scale or 0.25, deterministic=False)
    expected = (truth, *torch.autograd.grad(truth, given, grad))
    for layout, where in ((DENSE, None), (DENSE, positions), (window, None)):
        out = sparse_attention(*map(change, given), layout, positions=where, scale=scale)
        for a, b in zip((out, *torch.autograd.grad(out, given, grad)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert sdpa_calls == [40] * 3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"return_lse": True},
        {"deterministic": True},
        {"layout": pattern(HeadPattern(window=39), HeadPattern())},
        {"layout": AttentionLayout.dense(2, max_distance=39)},
        {"layout": AttentionLayout.dense(2, causal=False)},
        {"q_offset": 3},
        {"positions": TokenPositions.causal(40, 40, q_offset=43, k_offset=3)},
        {"positions": TokenPositions.from_padding_mask(torch.ones(2, 40))},
        {"q_len": 39},
        {"cu_seqlens": torch.tensor([0, 12, 40])},
    ],
    ids=str,
)
def test_calls_that_it_does_not_serve(kwargs: dict[str, Any], sdpa_calls: list[int]) -> None:
    given = inputs(q_len=kwargs.pop("q_len", 0))
    if "cu_seqlens" in kwargs:
        given = [x[:1] for x in given]
    with pytest.raises(ValueError, match="'sdpa' cannot serve sparse_attention"):
        sparse_attention(*given, kwargs.pop("layout", DENSE), **kwargs)
    assert not sdpa_calls


def test_wrong_calls_raise_what_they_raise_elsewhere(sdpa_calls: list[int]) -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="share one floating dtype"):
        sparse_attention(q, k.double(), v, DENSE)
    with pytest.raises(ValueError, match="positions describe each query"):
        sparse_attention(q, k, v, DENSE, positions=TokenPositions.causal(39, 39))
    with pytest.raises(ValueError, match="cannot serve mixed_attention: has no mixed_attention"):
        mixed_attention(q, k, v, torch.full((2,), 0.5), DENSE, DENSE)
    assert not sdpa_calls


def test_without_tokens(sdpa_calls: list[int]) -> None:
    """Such calls need no backend, and get gradients of 0."""
    empty = [torch.randn(2, n, 0, 16).requires_grad_() for n in (4, 2, 2)]
    assert sparse_attention(*empty, DENSE).shape == (2, 4, 0, 16)
    assert not sdpa_calls


def test_autocast_leaves_the_dtype(sdpa_calls: list[int]) -> None:
    given = inputs()
    expected = sparse_attention(*given, DENSE)
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse_attention(*given, DENSE)
    assert found.dtype == torch.float32 and torch.equal(found, expected) and len(sdpa_calls) == 2


def test_a_compiled_call_keeps_to_the_operators(sdpa_calls: list[int]) -> None:
    """Their backward needs the log-sum-exp."""
    run = torch.compile(lambda q, k, v: sparse_attention(q, k, v, DENSE), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="returns no log-sum-exp"):
        run(*inputs())


def test_registered_backends_come_first(sdpa_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "sdpa", lambda *args: pytest.fail("a backend was registered"))
    calls: list[bool] = []

    def refuses(request: AttentionRequest) -> str | None:
        calls.append(request.needs_lse)
        return None

    register_backend(
        Backend(name="own", refuses=refuses, sparse_attention=sparse_attention_reference, mixed_attention=None)
    )
    try:
        monkeypatch.setenv(VARIABLE, "")
        sparse_attention(*inputs(), DENSE)
        assert calls == [False] and not sdpa_calls
    finally:
        unregister_backend("own")


def test_the_choice_follows_the_environment(sdpa_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    sparse_attention(*given, DENSE)
    monkeypatch.setenv(VARIABLE, "reference")
    sparse_attention(*given, DENSE)
    monkeypatch.delenv(VARIABLE)
    sparse_attention(*given, DENSE)
    monkeypatch.setenv(VARIABLE, "nonesuch")
    with pytest.raises(ValueError, match="'nonesuch' is unknown"):
        sparse_attention(*given, DENSE)
    assert len(sdpa_calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_on_hopper(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the break-even length a dense call is SDPA's to the bit; above it our kernels serve it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("break-even lengths are measured for compute capability 9.0")
    monkeypatch.delenv(VARIABLE, raising=False)
    original, calls = sdpa.sdpa, []
    monkeypatch.setattr(op, "sdpa", lambda *args: calls.append(1) or original(*args))
    for length, served in ((1000, True), (sdpa.BREAK_EVEN[9, 0][dim], False)):
        q, k, v = (
            torch.randn(1, length, n, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (32, 8, 8)
        )
        calls.clear()
        out = sparse_attention(q, k, v, AttentionLayout.dense(8))
        truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert bool(calls) == served and (not served or torch.equal(out, truth))
        assert (out - truth).norm() <= 0.01 * truth.norm()
