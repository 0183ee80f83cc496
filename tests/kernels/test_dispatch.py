"""Backends plug in, are asked in order, say why they refuse, and leave again."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
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
    BlockList,
    HeadPattern,
    TokenPositions,
    available_backends,
    backends,
    dispatch,
    mixed_attention,
    mixed_attention_reference,
    ptxas,
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
    assert selection.reason == (
        "sdpa: serves whole unpadded sequences of which all heads read every earlier token; "
        "gluon: needs an NVIDIA GPU of compute capability 9.0, got device 'cpu'; "
        "triton: needs an NVIDIA GPU, got device 'cpu'"
    )
    assert not caplog.records, "that a CPU runs the reference is no news"


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
        op="sparse_attention", device_type="cpu", dtype=torch.float32, head_dim=16, layout=LAYOUT, num_rows=4,
        needs_lse=False,
    )  # fmt: skip
    assert second.op == "mixed_attention" and second.needs_lse
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


def test_built_in_backends_are_asked_in_this_order() -> None:
    assert available_backends() == ("sdpa", "gluon", "triton", "reference")
    for name in available_backends():
        unregister_backend(name)
    assert available_backends() == ("sdpa", "gluon", "triton", "reference")


BLOCKS = BlockList(block_size=128, row_ptr=(0, 1, 2), indices=(0, 1))
SMALL_BLOCKS = BlockList(block_size=64, row_ptr=(0, 1, 2), indices=(0, 1))
HOPPER = AttentionRequest(
    op="sparse_attention", device_type="cuda", dtype=torch.bfloat16, head_dim=128, capability=(9, 0)
)


def block_layout(blocks: BlockList, **kwargs: Any) -> AttentionLayout:
    return AttentionLayout(patterns=(HeadPattern(), HeadPattern(blocks=blocks)), **kwargs)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "head_dim": 64}, None),
        ({"head_dim": 256, "layout": AttentionLayout.dense(2, causal=False)}, None),
        ({"layout": block_layout(BLOCKS)}, None),
        ({"layout": block_layout(BLOCKS, num_dense_rows=256)}, None),
        ({"layout": AttentionLayout(patterns=(HeadPattern(),), num_dense_rows=100)}, None),
        ({"device_type": "cpu"}, "got device 'cpu'"),
        ({"capability": (8, 0)}, "needs compute capability 9.0, got 8.0"),
        ({"capability": (10, 0)}, "needs compute capability 9.0, got 10.0"),
        ({"dtype": torch.float32}, "got float32"),
        ({"head_dim": 96}, "got 96"),
        ({"value_dim": 64}, "head_dim 128, got 64"),
        ({"cuts_blocks": True}, "multiples of 128"),
        ({"layout": block_layout(SMALL_BLOCKS)}, "multiples of 128"),
        ({"layout": block_layout(BLOCKS, num_dense_rows=100)}, "multiples of 128"),
    ],
)
def test_what_gluon_refuses(changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_gluon_missing", lambda: None)
    refusal = backends.gluon_refuses(replace(HOPPER, **changes))
    if reason is None:
        assert refusal is None
    else:
        assert refusal is not None and reason in refusal


@pytest.mark.parametrize(
    ("layout", "positions", "cuts"),
    [
        (block_layout(BLOCKS), TokenPositions.causal(256, 256), False),
        (block_layout(BLOCKS), TokenPositions.causal(100, 228), False),
        (block_layout(BLOCKS), TokenPositions.causal(100, 229), True),
        (block_layout(BLOCKS), TokenPositions.causal(9, 128, k_offset=128, q_offset=256), True),
        (block_layout(BLOCKS), TokenPositions.from_padding_mask(torch.ones(1, 256)), True),
        (block_layout(SMALL_BLOCKS), TokenPositions.causal(128, 128), True),
        (AttentionLayout.dense(2), TokenPositions.from_padding_mask(torch.ones(1, 256)), False),
    ],
)
def test_whether_tiles_cut_blocks(layout: AttentionLayout, positions: TokenPositions, cuts: bool) -> None:
    assert dispatch._cuts_blocks(layout, positions) == cuts


IMPORT_PROBE = """
import sys, torch
assert "triton" not in sys.modules, "torch itself imports Triton now: this test shows nothing any more"
from sparse_hf_kernels import AttentionLayout, available_backends, sparse_attention
sparse_attention(*(torch.randn(1, 2, 8, 16) for _ in range(3)), AttentionLayout.dense(2))
assert available_backends() == ("sdpa", "gluon", "triton", "reference")
for name in ("triton", "torch._dynamo"):
    assert name not in sys.modules, f"computing on the CPU imports {name}"
"""


def test_the_cpu_needs_no_triton() -> None:
    """Neither importing the package nor a call on the CPU, which both GPU backends refuse, loads it."""
    run = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, env={})
    assert run.returncode == 0, run.stderr


@pytest.fixture
def ptxas_program(tmp_path: Path) -> Callable[[str], Path]:
    def make(release: str) -> Path:
        path = tmp_path / f"ptxas-{release}"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def ask_ptxas_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ptxas.warn_of_unsafe_ptxas.cache_clear()
    yield
    ptxas.warn_of_unsafe_ptxas.cache_clear()


@pytest.mark.parametrize(("release", "safe"), [("12.8", False), ("13.2", False), ("13.3", True), ("14.0", True)])
def test_ptxas(
    ptxas_program: Callable,
    release: str,
    safe: bool,
    monkeypatch: pytest.MonkeyPatch,
    ask_ptxas_again: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Hopper kernels and an unsafe ptxas give one warning, with what to do about it."""
    path = ptxas_program(release)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
    monkeypatch.setattr(ptxas, "ptxas_of_wheel", lambda: None)
    used = ptxas.ptxas_in_use()
    assert used is not None and used.path == path and used.is_safe == safe
    assert str(used) == f"{path} ({release})"
    fused = Backend(name="gluon", refuses=lambda request: None, sparse_attention=None, mixed_attention=None)
    with caplog.at_level(logging.WARNING, logger="sparse_hf_kernels"):
        for _ in range(3):
            dispatch._warn_of_compiler(HOPPER, fused)
            dispatch._warn_of_compiler(replace(HOPPER, capability=(8, 0)), fused)
    assert len(caplog.records) == (0 if safe else 1)
    if not safe:
        assert 'pip install "nvidia-cuda-nvcc>=13.3"' in caplog.text and release in caplog.text
        newer = ptxas.ptxas_at(ptxas_program("13.5"))
        monkeypatch.setattr(ptxas, "ptxas_of_wheel", lambda: newer)
        assert ptxas.remedy() == f"export TRITON_PTXAS_PATH={newer.path}"


def test_no_ptxas_warning_off_hopper(
    caplog: pytest.LogCaptureFixture, qkv: list[Tensor], ask_ptxas_again: None
) -> None:
    with caplog.at_level(logging.WARNING, logger="sparse_hf_kernels"):
        sparse_attention(*qkv, LAYOUT)
    assert not caplog.records


def test_a_ptxas_that_does_not_run(tmp_path: Path) -> None:
    broken = tmp_path / "ptxas"
    broken.write_text("no program")
    assert not ptxas.ptxas_at(broken).is_safe and "unknown release" in str(ptxas.ptxas_at(broken))


def test_ptxas_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ptxas_program: Callable) -> None:
    """Found where the wheel puts it, in the namespace package `nvidia`."""
    folder = tmp_path / "site" / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    shutil.copy(ptxas_program("13.5"), folder / "ptxas")
    found = ptxas.ptxas_of_wheel()
    assert found is not None and found.version == (13, 5)


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
    cache = SparseCache.for_model(model)
    first = model(ids[:, :12], past_key_values=cache).logits
    assert stand_in.calls == ["sparse_attention"] * 2, "nothing is evicted before the first tokens"
    stand_in.calls.clear()
    second = model(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    assert stand_in.calls == ["sparse_attention"] * 3, "one call per group of heads that keep the same keys"
    stand_in.calls.clear()
    for state in model._sparse_hf_handle.states:
        state.gate = lambda: torch.full((2,), 0.5)
    model(ids, use_cache=False)
    assert stand_in.calls == ["mixed_attention"] * 2
