"""Backends plug in, are asked in order, say why they refuse, and leave again."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import SparseCache, SparseConfig, Streaming, sparsify
from sparse_hf_kernels import (
    AttentionLayout,
    AttentionRequest,
    Backend,
    HeadPattern,
    available_backends,
    dispatch,
    mixed_attention,
    mixed_attention_reference,
    register_backend,
    select_backend,
    sparse_attention,
    sparse_attention_reference,
    unregister_backend,
)

VARIABLE = "SPARSE_HF_BACKEND"
LAYOUT = AttentionLayout(patterns=(HeadPattern(window=4), HeadPattern()))


@dataclass
class StandIn:
    """Counts its calls and computes what the reference computes."""

    refusal: str | None = None
    calls: list[str] = field(default_factory=list)
    requests: list[AttentionRequest] = field(default_factory=list)

    def refuses(self, request: AttentionRequest) -> str | None:
        self.requests.append(request)
        return self.refusal

    def sparse_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("sparse_attention")
        return sparse_attention_reference(*args, **kwargs)

    def mixed_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append("mixed_attention")
        return mixed_attention_reference(*args, **kwargs)


@pytest.fixture(autouse=True)
def restore_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_said", set())
    before = available_backends()
    yield
    for name in set(available_backends()) - set(before):
        unregister_backend(name)
    assert available_backends() == before


@pytest.fixture
def register() -> Callable[..., StandIn]:
    def make(name: str, refusal: str | None = None) -> StandIn:
        stand_in = StandIn(refusal)
        register_backend(
            Backend(
                name=name,
                refuses=stand_in.refuses,
                sparse_attention=stand_in.sparse_attention,
                mixed_attention=stand_in.mixed_attention,
            )
        )
        return stand_in

    return make


@pytest.fixture
def qkv() -> list[Tensor]:
    return [torch.randn(1, heads, 9, 16) for heads in (4, 2, 2)]


def request_for(qkv: list[Tensor], op: str = "sparse_attention") -> AttentionRequest:
    return AttentionRequest.of(op, qkv[0], LAYOUT)


def test_the_reference_serves_cpu(qkv: list[Tensor], caplog: pytest.LogCaptureFixture) -> None:
    selection = select_backend(request_for(qkv))
    assert selection.backend.name == available_backends()[-1] == "reference"
    assert "reference" in selection.reason


def test_called_by_the_operators(register: Callable, qkv: list[Tensor]) -> None:
    expected = sparse_attention(*qkv, LAYOUT)
    stand_in = register("stand_in")
    assert available_backends()[0] == "stand_in"
    assert torch.equal(sparse_attention(*qkv, LAYOUT), expected)
    assert stand_in.calls == ["sparse_attention"]
    gate = torch.tensor([0.5, 1.0])
    mixed_attention(*qkv, gate, AttentionLayout.dense(2), LAYOUT)
    assert stand_in.calls == ["sparse_attention", "mixed_attention"]
    (first, second) = stand_in.requests
    assert first == AttentionRequest(
        op="sparse_attention", device_type="cpu", dtype=torch.float32, head_dim=16, layout=LAYOUT
    )
    assert second.op == "mixed_attention"
    unregister_backend("stand_in")
    assert "stand_in" not in available_backends()
    assert torch.equal(sparse_attention(*qkv, LAYOUT), expected)
    assert len(stand_in.calls) == 2


def test_the_latest_registered_is_asked_first(register: Callable, qkv: list[Tensor]) -> None:
    first, second = register("first"), register("second")
    assert available_backends()[:2] == ("second", "first")
    sparse_attention(*qkv, LAYOUT)
    assert second.calls and not first.requests


def test_a_refusal_passes_on_and_is_logged_once(
    register: Callable, qkv: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    willing, refusing = register("willing"), register("refusing", "head_dim 16 is too small")
    with caplog.at_level(logging.WARNING, logger="sparse_hf_kernels"):
        for _ in range(3):
            sparse_attention(*qkv, LAYOUT)
    assert len(willing.calls) == 3 and not refusing.calls and len(refusing.requests) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "sparse_attention runs on the 'willing' backend (refusing: head_dim 16 is too small)"
    ]
    assert select_backend(request_for(qkv)).reason == "refusing: head_dim 16 is too small"
    refusing.refusal = "another cause"
    with caplog.at_level(logging.WARNING, logger="sparse_hf_kernels"):
        sparse_attention(*qkv, LAYOUT)
    assert len(caplog.records) == 2


def test_forced(register: Callable, qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, other = register("stand_in"), register("other")
    monkeypatch.setenv(VARIABLE, "stand_in")
    sparse_attention(*qkv, LAYOUT)
    assert stand_in.calls and not other.requests
    assert select_backend(request_for(qkv)).reason == f"forced by {VARIABLE}"
    monkeypatch.setenv(VARIABLE, "reference")
    sparse_attention(*qkv, LAYOUT)
    assert len(stand_in.calls) == 1
    monkeypatch.setenv(VARIABLE, "")
    sparse_attention(*qkv, LAYOUT)
    assert other.calls


def test_forced_but_impossible(register: Callable, qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    register("stand_in", "needs a GPU")
    monkeypatch.setenv(VARIABLE, "stand_in")
    with pytest.raises(ValueError, match="'stand_in' cannot serve sparse_attention: needs a GPU"):
        sparse_attention(*qkv, LAYOUT)
    monkeypatch.setenv(VARIABLE, "nonesuch")
    with pytest.raises(ValueError, match=r"'nonesuch' is unknown; available here: stand_in, .*reference"):
        sparse_attention(*qkv, LAYOUT)


def test_names_are_unique(register: Callable) -> None:
    register("stand_in")
    for name in ("stand_in", "reference"):
        with pytest.raises(ValueError, match="registered already"):
            register(name)
    unregister_backend("reference")
    assert available_backends()[-1] == "reference"


def test_called_by_a_sparsified_model(register: Callable) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    model = LlamaForCausalLM(config).eval()
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=6), head_masks=((1, 0), (0, 0))))
    ids = torch.randint(1, 99, (1, 20))
    expected = model(ids).logits
    stand_in = register("stand_in")
    assert torch.equal(model(ids).logits, expected)
    assert stand_in.calls == ["sparse_attention"] * 2, "one call per layer serves all its heads"
    stand_in.calls.clear()
    cached = model(ids, past_key_values=SparseCache.for_model(model)).logits
    torch.testing.assert_close(cached, expected)
    assert stand_in.calls == ["sparse_attention"] * 3, "one call per group of heads that keep the same keys"
    stand_in.calls.clear()
    for state in model._sparse_hf_handle.states:
        state.gate = lambda: torch.full((2,), 0.5)
    model(ids, use_cache=False)
    assert stand_in.calls == ["mixed_attention"] * 2
