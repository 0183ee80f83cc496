"""The benchmark of methods without a GPU: inputs, counts and checks, figures from given times, files."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparse_hf.bench import cuda_session
from sparse_hf.bench.check import MAX_RELATIVE_ERROR, WrongResultError, check_forward
from sparse_hf.bench.contenders import Call, Contender, DynamicHF
from sparse_hf.bench.method_plan import LENGTHS, METHODS, MethodOptions
from sparse_hf.bench.methods import measure_methods, method_benchmark
from sparse_hf.bench.peers import CUDNN, FLASH
from sparse_hf.bench.planted import LOCAL_LOGIT, NUM_TOPICS, TOPIC_LOGIT, planted_inputs
from sparse_hf.bench.runner import run_benchmark, write_files
from sparse_hf.bench.session import Session
from sparse_hf.bench.testing import FakeClock, FakePeer
from sparse_hf.bench.workload import Shape, make_inputs, selected_density
from sparse_hf.figures import Figure
from sparse_hf.methods import Explicit, FlexPrefill, MInference, XAttention, available_methods
from sparse_hf_kernels import AttentionLayout, BlockSelection, HeadPattern

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("streaming", "triangle", "local_global", "xattention", "minference-adaptive")
TINY = MethodOptions(methods=NAMES, num_heads=4, num_kv_heads=2, head_dim=16, seq_lens=(256, 1000))


def make_session(clock: FakeClock | None = None, *peers: Contender) -> Session:
    clock = clock or FakeClock()
    session = Session(device=CPU, clock=clock, chain_clock=clock, peers=peers, budget_ms=5)
    session.inputs = planted_inputs
    return session


def values(figures: Sequence[Figure]) -> dict[str, float]:
    return {figure.case: figure.value for figure in figures}


def kept_by_definition(selection: BlockSelection, batch: int, head: int, seq_len: int) -> Tensor:
    """Boolean `[seq_len, seq_len]`, pair by pair from the lists."""
    size, keep = selection.block_size, torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for row in range(selection.counts.shape[2]):
        for slot in range(int(selection.counts[batch, head, row])):
            block = int(selection.indices[batch, head, row, slot])
            keep[row * size : (row + 1) * size, block * size : (block + 1) * size] = True
    if selection.columns is not None:
        for column in selection.columns[batch, head].tolist():
            if column >= 0:
                keep[:, column] = True
    return keep.tril()


@pytest.mark.parametrize("seq_len", [300, 640, 1000])
@pytest.mark.parametrize(
    "method",
    [
        XAttention(threshold=0.5),
        XAttention(block_size=64, threshold=0.3),
        FlexPrefill(min_budget=128, gamma=0.1, tau=0),
        MInference(adaptive_budget=0.1),
        MInference(kind="block_sparse", top_k=2),
    ],
    ids=lambda method: f"{method.name}-{method.block_size}",
)
def test_the_density_of_a_selection_is_exact(method: XAttention, seq_len: int) -> None:
    q, k, _ = make_inputs(Shape(seq_len=seq_len, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32), CPU)
    selection = method.select(q, k, scale=0.25, q_offset=0)
    pairs = torch.tensor([[int(kept_by_definition(selection, 0, head, seq_len).sum()) for head in range(4)]])
    dense = seq_len * (seq_len + 1) // 2
    assert selected_density(selection, seq_len) == pytest.approx(pairs.double().mean().item() / dense, rel=1e-12)
    assert seq_len == 300 or pairs.sum() < 4 * dense, "something is left out"


def test_planted_scores_are_what_the_docs_say() -> None:
    """Means over block pairs: scores rise where topics agree, and near the diagonal."""
    shape = Shape(seq_len=6400, num_heads=2, num_kv_heads=1, head_dim=128, dtype=torch.float32)
    q, k, v = (x.detach() for x in planted_inputs(shape, CPU))
    assert q.shape == (1, 2, 6400, 128) and k.shape == v.shape == (1, 1, 6400, 128)
    assert v.std().item() == pytest.approx(1, abs=0.01) and v.mean().abs() < 0.01
    blocks = (x.unflatten(2, (50, 128)).mean(3) for x in (q, k))
    means = torch.einsum("bhid,bgjd->hij", *blocks) / 128**0.5
    far = torch.arange(50)[:, None] - torch.arange(50) > 10
    for head in range(2):
        scores = means[head][far]
        agree = scores > TOPIC_LOGIT / 2
        assert agree.double().mean().item() == pytest.approx(1 / NUM_TOPICS, abs=0.04)
        rise = scores[agree].mean().item() - scores[~agree].mean().item()
        assert rise == pytest.approx(TOPIC_LOGIT, abs=0.5)
    assert not torch.equal(means[0] > TOPIC_LOGIT / 2, means[1] > TOPIC_LOGIT / 2), "query heads differ"
    pairs = (q[0, 0] * k[0, 0]).sum(-1) / 128**0.5
    lagged = (q[0, 0, 1024:] * k[0, 0, :-1024]).sum(-1) / 128**0.5
    assert pairs.median().item() - lagged.median().item() == pytest.approx(LOCAL_LOGIT, abs=2)
    again = planted_inputs(shape, CPU)
    assert torch.equal(again[0], q) and not torch.equal(planted_inputs(shape, CPU, seed=1)[0], q)
    with pytest.raises(ValueError, match="head_dim >= 16, got 8"):
        planted_inputs(Shape(seq_len=64, head_dim=8), CPU)


def test_xattention_keeps_a_tenth_of_planted_inputs_and_nearly_all_of_normal_ones() -> None:
    shape = Shape(seq_len=16384, num_heads=1, num_kv_heads=1, head_dim=128, dtype=torch.float32)
    kept = []
    for make in (planted_inputs, make_inputs):
        q, k, _ = make(shape, CPU)
        selection = XAttention().select(q.detach(), k.detach(), scale=128**-0.5, q_offset=0)
        kept.append(selected_density(selection, 16384))
    assert 0.08 < kept[0] < 0.16 and kept[1] > 0.8


@pytest.mark.parametrize("method", [XAttention(threshold=0.4), MInference(adaptive_budget=0.1)])
@pytest.mark.parametrize("seq_len", [704, 1000])
def test_outputs_are_held_against_what_was_selected(method: XAttention, seq_len: int) -> None:
    """The check accepts the kernel, and no other choice of blocks."""
    shape = Shape(seq_len=seq_len, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    inputs = make_inputs(shape, CPU)
    layout = AttentionLayout(patterns=(HeadPattern(selected=True),) * 2)
    contender = DynamicHF(method=method, device="cpu")
    call = contender.bind(*inputs, layout)
    assert check_forward(call, inputs, layout) < MAX_RELATIVE_ERROR[torch.float32]
    q, k, v = (x.detach() for x in inputs)
    out, selection = call.forward().detach(), contender.select(q, k, layout)
    for head in range(4):
        keep = kept_by_definition(selection, 0, head, seq_len)
        scores = (q[0, head] @ k[0, head // 2].t() / 4).masked_fill(~keep, float("-inf"))
        torch.testing.assert_close(out[0, head], scores.softmax(-1) @ v[0, head // 2], atol=2e-5, rtol=2e-5)
    other = DynamicHF(method=XAttention(threshold=0.99), device="cpu").bind(*inputs, layout)
    wrong = Call(forward=call.forward, inputs=inputs, selection=other.selection)
    with pytest.raises(WrongResultError, match="differs by"):
        check_forward(wrong, inputs, layout)


def test_figures_follow_from_the_times() -> None:
    times = {"SDPA cuDNN, dense": 8.0, "SDPA flash, dense": 9.0, "sparse_hf, xattention": 2.0, "xattention": 0.5}
    session = make_session(FakeClock(times), FakePeer(CUDNN.name), FakePeer(FLASH.name))
    figures = measure_methods(session, TINY, TINY.shape(1000))
    assert not session.absences
    found, title = values(figures), "prefill of 1000 tokens"
    assert found[f"{title}, SDPA cuDNN: time"] == 8.0 and found[f"{title}, SDPA flash: density"] == 100.0
    assert found[f"{title}, xattention: time"] == 2.0 and found[f"{title}, xattention: selection alone"] == 0.5
    assert found[f"{title}, xattention: speed-up over SDPA cuDNN"] == 4.0
    assert found[f"{title}, streaming: speed-up over SDPA cuDNN"] == 8.0
    assert f"{title}, streaming: selection alone" not in found
    i, j = torch.arange(1000)[:, None], torch.arange(1000)
    triangle = ((i - j < 512) | (j < 8) | (i >= 1000 - 128)) & (j <= i)
    assert found[f"{title}, triangle: density"] == pytest.approx(100 * triangle.sum().item() / (1000 * 1001 / 2))
    q, k, _ = planted_inputs(TINY.shape(1000), CPU)
    selection = XAttention().select(q.detach(), k.detach(), scale=0.25, q_offset=0)
    kept = sum(int(kept_by_definition(selection, 0, head, 1000).sum()) for head in range(4))
    assert found[f"{title}, xattention: density"] == pytest.approx(100 * kept / (4 * 1000 * 1001 / 2))
    measured = {m.work: m for m in session.measurements if m.is_ours}
    assert set(measured) == set(NAMES)
    assert measured["xattention"].flops == pytest.approx(kept * 4 * 16)
    assert all(m.relative_error is not None and m.relative_error < 1e-2 for m in session.measurements)


def test_what_cannot_take_part_is_absent() -> None:
    session = make_session(None, FakePeer(CUDNN.name, factor=1.05))
    found = values(measure_methods(session, TINY, TINY.shape(256)))
    assert {case.split(", ")[1].split(":")[0] for case in found} == {"streaming", "triangle", "local_global"}
    assert not any("cuDNN" in case for case in found), "without cuDNN no ratio"
    reasons = {absence.contender: absence.reason for absence in session.absences}
    assert reasons["sparse_hf, xattention"] == "reads every key of 256 tokens and chooses nothing"
    assert reasons["SDPA cuDNN, dense, 256 tokens"].startswith("wrong: ")
    assert not any(absence.failed for absence in session.absences)


def test_every_method_with_defaults_is_compared() -> None:
    assert set(METHODS) >= set(available_methods()) - {Explicit.name}
    assert {"bigbird-128", "dilated-128", "strided-128", "fixed-128", "local_global-128"} <= set(METHODS)
    for name, method in METHODS.items():
        assert name.split("-")[0] in (method.name, "longnet") and "," not in name
    assert MethodOptions().chosen() == METHODS and MethodOptions().lengths() == LENGTHS
    assert MethodOptions(quick=True).lengths() == LENGTHS[:2]
    shape = MethodOptions().shape(8192)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype) == (32, 8, 128, torch.bfloat16)


def make_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts" / "make_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_leaves_what_a_table_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figure_keys: set[str]
) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    benchmark = method_benchmark(TINY, (FakePeer(CUDNN.name),))
    steps: list[str] = []
    result = run_benchmark(benchmark, make_session(FakeClock({"sparse_hf, streaming": 0.25})), progress=steps.append)
    assert not result.failed, result.session.absences
    assert steps == ["methods, 256 tokens", "methods, 1000 tokens"]
    assert [path.name for path in write_files(benchmark, result, tmp_path)] == ["methods.json", "methods.csv"]
    rows = json.loads((tmp_path / "methods.json").read_text())
    assert all(set(row) == figure_keys for row in rows)
    assert rows[0]["command"] == (
        f"sparse-hf bench methods --methods {','.join(NAMES)} --seq-lens 256,1000 --head-dim 16 --heads 4 --kv-heads 2"
    )
    with (tmp_path / "methods.csv").open() as file:
        table = list(csv.DictReader(file))
    ours = {row["work"]: row for row in table if row["contender"] == "sparse_hf" and row["seq_len"] == "1000"}
    assert set(ours) == set(NAMES) and 0 < float(ours["xattention"]["density"]) < 1
    alone = [row for row in table if row["case"] == "methods, selection alone"]
    assert [row["contender"] for row in alone] == ["xattention", "minference-adaptive"]
    text = make_tables().render("<!-- grid: methods / prefill of 1000 tokens -->\n<!-- end -->", tmp_path)
    assert text.splitlines()[1] == "| | density, % | time, ms | selection alone, ms | speed-up over SDPA cuDNN, ratio |"
    assert "| SDPA cuDNN | 100.00 | 1.000 |  | 1.000 |" in text
    assert f"| streaming | {rows_value(rows, 'streaming: density'):.2f} | 0.250 |  | 4.000 |" in text
    some = "<!-- grid: methods / prefill of 1000 tokens | time; density -->\n<!-- end -->"
    text = make_tables().render(some, tmp_path)
    assert text.splitlines()[1] == "| | time, ms | density, % |" and "| SDPA cuDNN | 1.000 | 100.00 |" in text
    with pytest.raises(ValueError, match="is of speed; there are density"):
        make_tables().render(some.replace("time;", "speed;"), tmp_path)


def rows_value(rows: Sequence[Mapping[str, float]], end: str) -> float:
    return next(row["value"] for row in rows if str(row["case"]).endswith(f"1000 tokens, {end}"))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """All methods with real clocks and peers at 8K tokens; XAttention keeps about what the inputs were made for."""
    benchmark = method_benchmark(MethodOptions(quick=True, seq_lens=(8192,)))
    result = run_benchmark(benchmark, cuda_session(benchmark.options))
    assert not result.failed, result.session.absences
    ours = {m.work: m for m in result.session.measurements if m.is_ours}
    assert set(ours) == set(METHODS), result.session.absences
    assert all(m.ms > 0 for m in ours.values()) and 0.08 < ours["xattention"].density < 0.25
    assert tmp_path / "methods.json" in write_files(benchmark, result, tmp_path)
