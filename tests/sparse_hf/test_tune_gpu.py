"""`sparse-hf tune` on a GPU, one tiny case each: real candidates, real times, and the tables put to use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_hf import SparseConfig, Streaming, XAttention
from sparse_hf import break_even as lookup
from sparse_hf.tune.break_even import BreakEvenOptions, break_even_session, tune_break_even, write_break_even_table
from sparse_hf.tune.candidates import shipped
from sparse_hf.tune.kernels import row_error, tune_kernels, write_kernel_table
from sparse_hf.tune.plan import KernelOptions, plan_kernels, tuning_device
from sparse_hf_kernels import AttentionLayout, HeadPattern, sparse_attention, tuned
from sparse_hf_kernels.tuned import Config, Key

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.delenv(lookup.VARIABLE, raising=False)
    lookup.measured.cache_clear()


def some_candidates(key: Key, *, quick: bool) -> list[Config]:
    """One that fits, and one that takes more shared memory than any GPU has."""
    base = dict(shipped(key))
    if key.backend == "gluon":
        fits = {"columns": 64} if key.kind == "forward" else {"consumer_registers": 240, "producer_registers": 24}
        return [tuple({**base, **fits}.items()), tuple({**base, "slots": 8, "rows": 128}.items())]
    fits = {"rows": 16 if key.kind == "decode" else 32, "columns": 32, "num_warps": 4, "num_stages": 2}
    large = {"rows": 256, "columns": 128} if key.kind == "dkdv" else {"rows": 128, "columns": 256}
    return [tuple({**base, **fits}.items()), tuple({**base, **large, "num_warps": 8, "num_stages": 5}.items())]


def attend() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 700, 128, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    layout = AttentionLayout(patterns=(HeadPattern(), HeadPattern(window=200, num_sink_tokens=10)))
    out, _ = sparse_attention(q, k, v, layout, return_lse=True)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_kernels(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("gluon needs compute capability 9.0")
    monkeypatch.setenv("SPARSE_HF_BACKEND", backend)
    monkeypatch.setattr("sparse_hf.tune.kernels.candidates", some_candidates)
    options = KernelOptions(backend=backend, head_dims=(128,), quick=True, seq_len=512, num_heads=4, num_kv_heads=2)
    device, clock = tuning_device()
    with tuned.in_force(None):
        before = attend()
        results = list(tune_kernels(plan_kernels(options, device)[0], options, device, clock))
        for result in results:
            assert [skip.reason for skip in result.skipped] == ["too large"], (result.key, result.skipped)
            assert all(time > 0 for pair in result.times_ms.values() for time in pair) and result.ratio <= 1
        path = tmp_path / "tuned.json"
        write_kernel_table(path, results)
    table = tuned.read_table(path)
    assert set(table.configs) == {result.key for result in results}
    # What is put in force is not the shipped configuration, whoever won.
    other = {result.key: some_candidates(result.key, quick=True)[0] for result in results}
    with tuned.in_force(tuned.TunedTable(source="test", configs=other)):
        for actual, expected in zip(attend(), before, strict=True):
            assert row_error(actual, expected) < 2e-2


def test_break_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static and a dynamic method: what is written is what `min_seq_len: auto` reads."""
    methods = Streaming(), XAttention()
    options = BreakEvenOptions(
        methods=methods, lengths=(256, 2048, 8192), num_heads=8, num_kv_heads=2, head_dim=64, budget_ms=5
    )
    session = break_even_session(options)
    results = list(tune_break_even(options, session))
    assert [result.method for result in results] == list(methods), session.absences
    for result in results:
        assert result.ratios[-1][0] == 8192 and all(ratio > 0 for _, ratio in result.ratios + result.deployed_ratios)
    path = tmp_path / "lengths.json"
    write_break_even_table(path, results)
    monkeypatch.setenv(lookup.VARIABLE, str(path))
    lookup.measured.cache_clear()
    for result in results:
        config = SparseConfig(sparse=result.method, min_seq_len="auto")
        resolved = lookup.resolve_min_seq_len(config, device=torch.device("cuda"), head_dim=64)
        assert resolved.min_seq_len == (lookup.ALWAYS_DENSE if result.tokens is None else result.tokens)
    lookup.measured.cache_clear()
