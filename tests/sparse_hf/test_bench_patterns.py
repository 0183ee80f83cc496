"""The benchmark of patterns without a GPU: its peers are right, its figures follow from given times, and its files."""

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
from sparse_hf.bench.contenders import Contender
from sparse_hf.bench.pattern_plan import BOUND_LEN, FULL, PATTERNS, PatternOptions
from sparse_hf.bench.patterns import SAME_TIME, break_even_figures, measure_patterns, pattern_benchmark, pattern_peers
from sparse_hf.bench.peers import CUDNN, FLASH, flex_block_mask
from sparse_hf.bench.report import summary_rows
from sparse_hf.bench.runner import run_benchmark, write_files
from sparse_hf.bench.session import Entry, Measurement, Session
from sparse_hf.bench.testing import FakeClock, FakePeer
from sparse_hf.bench.torch_sparse import Csr, TorchSparse
from sparse_hf.bench.workload import Direction, Shape, density, make_inputs, random_blocks, uniform
from sparse_hf.figures import Figure
from sparse_hf.methods import Dilated
from sparse_hf_kernels import AttentionLayout, HeadPattern

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
TINY = PatternOptions(num_heads=4, num_kv_heads=2, head_dim=16, seq_lens=(160, 896))


def make_session(clock: FakeClock | None = None, *peers: Contender) -> Session:
    clock = clock or FakeClock()
    return Session(device=CPU, clock=clock, chain_clock=clock, peers=peers, budget_ms=5)


def values(figures: Sequence[Figure]) -> dict[str, float]:
    return {figure.case: figure.value for figure in figures}


def brute_force(q: Tensor, k: Tensor, v: Tensor, keeps: Sequence[Tensor]) -> Tensor:
    """Softmax over the kept keys `keeps[kv_head] [seq_len, seq_len]`, head by head, in fp32."""
    out = torch.zeros_like(q, dtype=torch.float32)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        scores = q[0, head].float() @ k[0, head // group].float().t() / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~keeps[head // group], float("-inf")).softmax(-1)
        out[0, head] = weights.nan_to_num(0.0) @ v[0, head // group].float()
    return out


def kept_by_definition(name: str, seq_len: int) -> Tensor:
    """One head's keys, written from the definitions."""
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None]
    block = i // 128 - j // 128
    keep = {
        "window": i - j < 4096,
        "dilated": torch.isin(block, torch.tensor([0, 1, 2, 4, 8, 16, 32])),
        "triangle": (i - j < 512) | (j < 8) | (i >= seq_len - 128),
    }[name]
    return keep & (j <= i)


@pytest.mark.parametrize("name", ["window", "dilated", "triangle"])
@pytest.mark.parametrize("seq_len", [96, 1000, 4300])
def test_patterns_are_what_they_are_called(name: str, seq_len: int) -> None:
    layout = PATTERNS[name].layout(2, seq_len)
    pairs = int(kept_by_definition(name, seq_len).sum())
    assert density(layout, seq_len) == pytest.approx(pairs / (seq_len * (seq_len + 1) / 2), rel=1e-12)


def test_densities_at_the_longest_length() -> None:
    """Window 4096, 3% of the blocks, 98 to 99% left out, and the triangle's band, all at 128K."""
    kept = {name: density(pattern.layout(2, BOUND_LEN), BOUND_LEN) for name, pattern in PATTERNS.items()}
    assert kept["window"] == pytest.approx(0.0615, abs=1e-3)
    assert kept["block-sparse"] == pytest.approx(0.03, rel=0.05), "of the own block one half"
    assert 0.01 <= kept["dilated"] <= 0.02
    assert kept["triangle"] == pytest.approx(0.0099, abs=2e-4)


@pytest.mark.parametrize("seq_len", [1, 130, 384])
@pytest.mark.parametrize(
    "layout",
    [
        AttentionLayout.dense(2),
        uniform(HeadPattern(window=37), 2),
        uniform(HeadPattern(window=20, num_sink_tokens=3, num_last_tokens=50), 2),
        uniform(Dilated(block_size=32).pattern(), 2),
        random_blocks(2, 384, 0.4),
        AttentionLayout(patterns=(HeadPattern(window=5), HeadPattern(window=9, num_last_tokens=7)), num_dense_rows=12),
    ],
)
def test_torch_sparse_is_masked_softmax(layout: AttentionLayout, seq_len: int) -> None:
    shape = Shape(seq_len=seq_len, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    inputs = make_inputs(shape, CPU)
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None]
    keeps = [layout.allowed(pattern, i, j, seq_len - 1) & (j <= i) for pattern in layout.patterns]
    assert TorchSparse().refuses(shape, layout) is None
    with torch.no_grad():
        call = TorchSparse().bind(*inputs, layout)
        first, again = call.forward(), call.forward()
    torch.testing.assert_close(first, brute_force(*(x.detach() for x in inputs), keeps), atol=2e-6, rtol=2e-6)
    assert torch.equal(first, again), "a call leaves nothing behind"
    pairs = sum(int(keep.sum()) for keep in (keeps if len(layout.groups) > 1 else keeps[:1]))
    assert call.held_bytes == 8 * pairs + 4 * (seq_len + 1) * len(layout.groups)


def test_torch_sparse_gives_zero_where_no_key_is_kept() -> None:
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]]).bool()
    csr = Csr(
        row_ptr=torch.tensor([0, 1, 1, 3], dtype=torch.int32),
        columns=mask.nonzero()[:, 1].int(),
        rows=mask.nonzero()[:, 0].int(),
    )
    q, k, v = torch.randn(3, 3, 8)
    weights = (100 * q @ k.t()).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(csr.attend(csr.matrix(), q, k.t(), v, 100.0), weights @ v)


def test_torch_sparse_says_what_does_not_fit() -> None:
    shape = Shape(seq_len=128 * 1024)
    window = PATTERNS["window"].layout(8, shape.seq_len)
    pairs = 4096 * 4097 // 2 + (shape.seq_len - 4096) * 4096
    words = TorchSparse(1.0).refuses(shape, window) or ""
    assert f"{pairs * 16 / 2**30:.2f} GiB, more than the 1 GiB" in words and "131072 tokens" in words
    assert TorchSparse(pairs * 16 / 2**30).refuses(shape, window) is None, "heads of one pattern share it"
    blocks = PATTERNS["block-sparse"].layout(8, 32 * 1024)
    needs = [int(blocks.row_counts(pattern, 32 * 1024).sum()) for pattern in blocks.patterns]
    fits = (8 * sum(needs) + 8 * max(needs)) / 2**30
    assert TorchSparse(fits).refuses(Shape(seq_len=32 * 1024), blocks) is None
    assert TorchSparse(fits - 1e-6).refuses(Shape(seq_len=32 * 1024), blocks)
    dense = TorchSparse(1e9).refuses(shape, AttentionLayout.dense(8)) or ""
    assert "8,590,000,128 pairs" in dense and "int32" in dense


@pytest.mark.parametrize("name", [*PATTERNS, "late"])
def test_flex_masks_cover_the_patterns(name: str) -> None:
    """Every kept pair lies in a listed block, a full block keeps all pairs, and a partial one those of the mask."""
    seq_len, size = 1280, 128
    late = uniform(HeadPattern(window=100, num_sink_tokens=130, num_last_tokens=200), 2)
    layout = late if name == "late" else PATTERNS[name].layout(2, seq_len)
    mask = flex_block_mask(layout, seq_len, 4, CPU)
    rows = torch.arange(seq_len)
    for head in range(mask.kv_num_blocks.shape[1]):
        pattern = layout.patterns[head // 2]
        keeps = layout.allowed(pattern, rows[:, None], rows[None], seq_len - 1)
        reads = torch.zeros_like(keeps)
        for row in range(seq_len // size):
            q = slice(row * size, (row + 1) * size)
            for column in mask.full_kv_indices[0, head, row, : mask.full_kv_num_blocks[0, head, row]].tolist():
                reads[q, column * size : (column + 1) * size] = True
            for column in mask.kv_indices[0, head, row, : mask.kv_num_blocks[0, head, row]].tolist():
                k = slice(column * size, (column + 1) * size)
                assert not reads[q, k].any(), "a block must not be listed twice"
                reads[q, k] = mask.mask_mod(torch.tensor(0), torch.tensor(head), rows[q, None], rows[None, k])
        assert torch.equal(reads, keeps)


def test_figures_follow_from_the_times() -> None:
    clock = FakeClock(
        {
            "SDPA cuDNN, dense": 8.0,
            "SDPA flash, dense": 6.0,
            "sparse_hf, triangle": 0.5,
            "FlexAttention, triangle": 2.0,
            "torch.sparse fp32, triangle": 300.0,
        }
    )
    session = make_session(clock, FakePeer(CUDNN.name), FakePeer(FLASH.name), FakePeer("FlexAttention"), TorchSparse())
    shape = TINY.shape(896)
    figures = measure_patterns(session, TINY, shape, "forward")
    assert not session.absences
    found = values(figures)
    assert found["dense causal forward, 896 tokens: SDPA cuDNN"] == 8.0
    assert found["dense causal forward, 896 tokens: SDPA flash"] == 6.0
    title = "triangle forward, 896 tokens"
    assert [found[f"{title}: {name}"] for name in ("sparse_hf", "FlexAttention", "torch.sparse fp32")] == [0.5, 2, 300]
    assert found[f"{title}: speed-up over SDPA cuDNN"] == 16.0
    pairs = int(kept_by_definition("triangle", 896).sum())
    assert found[f"{title}: density"] == pytest.approx(100 * pairs / (896 * 897 / 2))
    assert {figure.case for figure in figures if figure.must is not None} == set(), "no bound was set for this problem"
    own = {m.work: m for m in session.measurements if m.is_ours}
    assert set(own) == {pattern.title for pattern in PATTERNS.values()}
    errors = [m.relative_error for m in session.measurements]
    assert len(errors) == 2 + 3 * len(PATTERNS) and all(error is not None and error < 1e-2 for error in errors)


def test_gradients_are_checked_where_the_pattern_leaves_keys_out(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(None, FakePeer(CUDNN.name))
    options = PatternOptions(patterns=("triangle",), num_heads=4, num_kv_heads=2, head_dim=16)
    figures = values(measure_patterns(session, options, TINY.shape(896), "both"))
    assert figures["triangle forward + backward, 896 tokens: speed-up over SDPA cuDNN"] == 1.0
    ours = next(m for m in session.measurements if m.is_ours)
    assert ours.direction == "both" and ours.relative_error is not None and ours.relative_error < 1e-2

    seen: list[Entry] = []

    def measure(self: Session, case: str, entries: Sequence[Entry], direction: Direction) -> dict[str, Measurement]:
        seen.extend(entries)
        return {}

    monkeypatch.setattr(Session, "measure", measure)
    measure_patterns(make_session(), TINY, TINY.shape(16384), "both")
    assert len(seen) == len(PATTERNS)
    for entry in seen:
        assert entry.check is not None
        shape, layout = entry.check
        assert shape.seq_len < 6000 and density(layout, shape.seq_len) < 1


def test_memory_counts_what_a_peer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "_warm_up", lambda self, call: 10.0 if call() is not None else None)
    found = values(measure_patterns(make_session(None, TorchSparse()), TINY, TINY.shape(896), "forward"))
    pairs = int(kept_by_definition("triangle", 896).sum())
    held = 8 * pairs + 4 * 897
    assert found["triangle forward, 896 tokens: memory of sparse_hf"] == 10.0
    assert found["triangle forward, 896 tokens: memory of torch.sparse fp32"] == pytest.approx(10 + held / 2**20)


def test_wrong_peers_have_no_figure() -> None:
    session = make_session(None, FakePeer(CUDNN.name, factor=1.05), FakePeer("FlexAttention", factor=0.95))
    found = values(measure_patterns(session, TINY, TINY.shape(160), "forward"))
    assert not any("cuDNN" in case or "Flex" in case for case in found)
    assert "triangle forward, 160 tokens: sparse_hf" in found
    assert len(session.absences) == 5 and all(a.reason.startswith("wrong: ") for a in session.absences)


def test_bounds_hold_for_the_problem_they_were_set_for() -> None:
    triangle, full = PATTERNS["triangle"], PatternOptions()
    assert [pattern.must for pattern in PATTERNS.values()] == [15, 22, 28, 30]
    assert full.must(triangle, "forward", 131072) == 30 and 131072 in FULL["forward"]
    assert full.must(triangle, "forward", 65536) is None and full.must(triangle, "both", 131072) is None
    assert PatternOptions(num_heads=16).must(triangle, "forward", 131072) is None
    assert PatternOptions(head_dim=64).must(triangle, "forward", 131072) is None
    row = Figure(case="x", value=31, unit="ratio", lower_is_better=False, must=30)
    below = Figure(case="y", value=29, unit="ratio", lower_is_better=False, must=30)
    assert [cells[-1] for cells in summary_rows([row, below])] == ["must", "below"]


def ours_per_length(ratios: Mapping[int, float]) -> Session:
    """A session that measured the triangle at `ratios` of the better of two dense attentions, 2 and 3 ms."""
    session = make_session()
    options = PatternOptions(patterns=("triangle",), num_heads=4, num_kv_heads=2, head_dim=16)
    for seq_len, ratio in ratios.items():
        session.clock = FakeClock(
            {"SDPA cuDNN, dense": 2.0, "SDPA flash, dense": 3.0, "sparse_hf, triangle": 2 * ratio}
        )
        session.peers = (FakePeer(CUDNN.name), FakePeer(FLASH.name))
        measure_patterns(session, options, options.shape(seq_len), "forward")
    return session


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [
        ({64: 1.5, 128: 0.9, 192: 1.2, 256: 0.8, 320: 0.1}, 256),
        ({64: 1.0, 128: SAME_TIME, 192: 0.5}, 64),
        ({192: 0.9, 64: 2.0, 128: SAME_TIME + 0.01}, 192),
        ({64: 0.5, 128: 1.4}, None),
    ],
)
def test_break_even_is_the_length_from_which_ours_is_never_slower(
    ratios: Mapping[int, float], tokens: int | None
) -> None:
    session = ours_per_length(ratios)
    figures = break_even_figures(session, PatternOptions(patterns=("triangle",)))
    if tokens is None:
        assert not figures
        (absence,) = session.absences
        assert (absence.case, absence.contender) == ("break-even", "triangle forward")
        assert absence.reason.startswith("slower than dense at the longest") and not absence.failed
        return
    (figure,) = figures
    assert (figure.value, figure.unit, figure.lower_is_better) == (tokens, "tokens", True)
    assert figure.case == "triangle forward: break-even length against the best of SDPA cuDNN, SDPA flash"


def make_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts" / "make_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_peers(options: PatternOptions, direction: Direction) -> tuple[Contender, ...]:
    return tuple(FakePeer(peer.name) for peer in pattern_peers(options, direction) if "torch" not in peer.name)


def test_a_run_leaves_what_the_document_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figure_keys: set[str]
) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    benchmark = pattern_benchmark(TINY, fake_peers)
    steps: list[str] = []
    clock = FakeClock({"sparse_hf, window 4096": 0.25})
    result = run_benchmark(benchmark, make_session(clock), progress=steps.append)
    assert not result.failed, result.session.absences
    assert steps == [
        "patterns-forward, 160 tokens",
        "patterns-forward, 896 tokens",
        "patterns-both, 160 tokens",
        "patterns-both, 896 tokens",
        "break-even, all lengths",
    ]
    written = write_files(benchmark, result, tmp_path)
    plot = ["patterns_speedup.png"] if importlib.util.find_spec("matplotlib") else []
    assert [path.name for path in written] == ["patterns.json", "patterns.csv", *plot]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])
    rows = json.loads((tmp_path / "patterns.json").read_text())
    assert all(set(row) == figure_keys for row in rows)
    assert rows[0]["command"] == "sparse-hf bench patterns --seq-lens 160,896 --head-dim 16 --heads 4 --kv-heads 2"
    with (tmp_path / "patterns.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["contender"] == "sparse_hf"]
    assert len(table) == 4 * len(PATTERNS)
    assert all(float(row["useful_tflops"]) > 0 and row["p20_ms"] and row["density"] for row in table)
    text = make_tables().render((ROOT / "docs" / "benchmarks" / "patterns.md").read_text(), tmp_path)
    assert text.count("| 896 tokens |") == 2 * (1 + len(PATTERNS))
    assert "| window 4096 forward: break-even length against the best of SDPA cuDNN, SDPA flash | 160 |" in text
    assert "| | density, % | sparse_hf, ms | FlexAttention, ms | speed-up over SDPA cuDNN, ratio |" in text
    assert "| 896 tokens | 100.00 | 0.250 | 1.000 | 4.000 |" in text


def test_tables_without_figures_fail(tmp_path: Path) -> None:
    render = make_tables().render
    with pytest.raises(FileNotFoundError, match=r"patterns\.json"):
        render("<!-- grid: patterns / window -->\n<!-- end -->", tmp_path)
    row = {"case": "a, 1 tokens: b", "value": 2.0, "unit": "ms", "must": 3, "baseline": None}
    source = {"hardware": "h", "software": "s", "commit": "c", "command": "x"}
    (tmp_path / "patterns.json").write_text(json.dumps([{**row, **source}]))
    for wanted in ("grid: patterns / b", "grid: patterns", "table: patterns / c"):
        with pytest.raises(ValueError, match=f"no figure for <!-- {wanted} -->"):
            render(f"<!-- {wanted} -->\nold\n<!-- end -->", tmp_path)
    assert render("<!-- grid: patterns / a -->\nold\n<!-- end -->", tmp_path) == (
        "<!-- grid: patterns / a -->\n| | b, ms |\n|---|---|\n| 1 tokens | 2.000 (bound 3) |\n<!-- end -->"
    )


def test_full_and_quick_runs_compile_flex_where_they_say() -> None:
    full, quick = PatternOptions(), PatternOptions(quick=True)
    assert [seq_len for direction, seq_len in full.steps() if direction == "forward"] == [1024 << n for n in range(8)]
    assert len(quick.steps()) < len(full.steps()) and quick.budget_ms < full.budget_ms
    assert full.flex_lengths("forward") == (32768, 131072) and full.flex_lengths("both") == ()
    assert quick.flex_lengths("forward") == () and PatternOptions(seq_lens=(9,)).flex_lengths("both") is None
    assert [peer.name for peer in pattern_peers(full, "both")] == ["SDPA cuDNN", "SDPA flash", "FlexAttention"]
    assert pattern_peers(full, "forward")[-1] == TorchSparse(full.torch_sparse_gib)
    assert PatternOptions(quick=True, patterns=("window",), torch_sparse_gib=4).command() == (
        "sparse-hf bench patterns --quick --patterns window --torch-sparse-gib 4"
    )


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """Real clocks and all peers on short inputs."""
    benchmark = pattern_benchmark(PatternOptions(quick=True, seq_lens=(2048, 8192)))
    result = run_benchmark(benchmark, cuda_session(benchmark.options))
    assert not result.failed, result.session.absences
    found = {(m.contender, m.work) for m in result.session.measurements if m.direction == "forward"}
    names = ("sparse_hf", TorchSparse.name)
    assert found >= {(name, pattern.title) for name in names for pattern in PATTERNS.values()}, result.session.absences
    assert all(m.ms > 0 and m.peak_mib is not None for m in result.session.measurements)
    assert tmp_path / "patterns.json" in write_files(benchmark, result, tmp_path)
