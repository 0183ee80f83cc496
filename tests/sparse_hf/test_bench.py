"""The kernel benchmark without a GPU: counting, timing by turns, figures from given times, and its files."""

from __future__ import annotations

import csv
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf.bench import CASES, Options, cuda_session, run_kernels, write_result
from sparse_hf.bench.cases import RUN, rate_figures
from sparse_hf.bench.contenders import Call, SparseHF
from sparse_hf.bench.peers import FlashAttention4, Flex, Sdpa, flex_block_mask
from sparse_hf.bench.plan import BOUND_LENGTHS, FULL, Bound
from sparse_hf.bench.report import COLUMNS, csv_rows, ratio_to_best_peer, verdict
from sparse_hf.bench.session import Session
from sparse_hf.bench.timing import MAX_ROUNDS, MIN_ROUNDS, Sample, alternate
from sparse_hf.bench.workload import (
    Shape,
    density,
    kept_pairs,
    random_blocks,
    streaming,
    uniform,
    useful_flops,
)
from sparse_hf.cli import main
from sparse_hf.figures import Figure
from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, sparse_attention

CPU = torch.device("cpu")


class FakeClock:
    """Gives each label its milliseconds; a label that was not given takes 1. Runs nothing and notes the order."""

    def __init__(self, **times: float) -> None:
        self.times, self.order = times, list[str]()

    def record(self, label: str, call: Callable[[], object]) -> float:
        self.order.append(label)
        return self.times.get(label, 1.0)

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)


@dataclass(frozen=True)
class Peer:
    """Serves every layout with the reference; `factor` spoils its output."""

    name: str
    factor: float = 1.0
    refusal: str | None = None

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return self.refusal

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        return Call(forward=lambda: sparse_attention(q, k, v, layout) * self.factor, inputs=(q, k, v))


def make_session(clock: FakeClock | None = None, *peers: Peer) -> Session:
    clock = clock or FakeClock()
    return Session(device=CPU, clock=clock, chain_clock=clock, peers=peers, budget_ms=5, matmul_size=32)


TINY = Shape(seq_len=160, num_heads=4, num_kv_heads=2, head_dim=16)
OPTIONS = Options(num_heads=4, num_kv_heads=2)


def brute_force_pairs(layout: AttentionLayout, seq_len: int) -> int:
    rows = torch.arange(seq_len)
    causal = rows[None] <= rows[:, None]
    return sum(int((layout.allowed(p, rows[:, None], rows[None]) & causal).sum()) for p in layout.patterns)


@pytest.mark.parametrize("seq_len", [1, 127, 128, 300, 512])
@pytest.mark.parametrize(
    "make",
    [
        AttentionLayout.dense,
        lambda heads: uniform(streaming(70, 10), heads),
        lambda heads: AttentionLayout(patterns=(HeadPattern(), streaming(3, 1)) * (heads // 2)),
        lambda heads: random_blocks(heads, 512, 0.4),
        lambda heads: replace(random_blocks(heads, 512, 0.4), max_distance=200),
        lambda heads: replace(random_blocks(heads, 512, 0.4), num_dense_rows=150),
    ],
)
def test_pairs_are_counted_exactly(make: Callable[[int], AttentionLayout], seq_len: int) -> None:
    layout = make(4)
    pairs = brute_force_pairs(layout, seq_len)
    assert kept_pairs(layout, seq_len) == pairs
    assert density(layout, seq_len) == pytest.approx(pairs / (4 * seq_len * (seq_len + 1) / 2))
    shape = Shape(seq_len=seq_len, num_heads=8, num_kv_heads=4, head_dim=16)
    # Two products of 2 * head_dim FLOPs per pair and query head, two query heads per KV head.
    assert useful_flops(shape, layout, "forward") == pairs * 2 * 4 * 16
    assert useful_flops(shape, layout, "backward") == pairs * 2 * 4 * 16 * 2.5
    assert useful_flops(shape, layout, "both") == pairs * 2 * 4 * 16 * 3.5


def test_pairs_beyond_a_block_list_raise() -> None:
    with pytest.raises(ValueError, match="covers 128 tokens, got 129"):
        kept_pairs(random_blocks(2, 128, 0.5), 129)


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.05])
def test_random_blocks_keep_what_they_say(keep: float) -> None:
    layout = random_blocks(4, 128 * 64, keep)
    assert density(layout, 128 * 64) == pytest.approx(keep, rel=0.25)
    masks = [pattern.blocks.mask for pattern in layout.patterns if pattern.blocks is not None]
    assert len(masks) == 4 and all(bool(mask.diagonal().all()) for mask in masks)
    assert not torch.equal(masks[0], masks[1]), "every KV head has its own"


def test_turns_go_back_and_forth_within_the_budget() -> None:
    clock = FakeClock(a=4.0, b=1.0)
    samples = alternate({"a": lambda: None, "b": lambda: None}, clock, budget_ms=10)
    # A round takes 5 ms, and 2 x 10 ms may be spent.
    assert clock.order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert samples["a"].times_ms == (4.0,) * 4 and samples["b"].median == 1.0
    for cost, rounds in ((1e5, MIN_ROUNDS), (1e-9, MAX_ROUNDS)):
        clock = FakeClock(a=cost)
        assert len(alternate({"a": lambda: None}, clock, budget_ms=10)["a"].times_ms) == rounds
    assert alternate({}, clock, budget_ms=10) == {}


def test_the_collector_leaves_models_alone_while_calls_are_timed() -> None:
    """Not what calls make themselves, nor what is there when none are timed."""
    frozen: list[int] = []

    class Watching:
        def record(self, label: str, call: Any) -> float:
            frozen.append(gc.get_freeze_count())
            return 1.0

        def read(self, handles: Any) -> list[float]:
            return list(handles)

    before = gc.get_freeze_count()
    alternate({"a": lambda: None}, Watching(), budget_ms=1)
    assert min(frozen) > before + 1000 and gc.get_freeze_count() == 0


def test_quantiles() -> None:
    sample = Sample((5.0, 1.0, 2.0, 3.0, 4.0, 100.0))
    assert (sample.median, sample.quantile(0.2), sample.quantile(0.8)) == (3.5, 2.0, 5.0)


def test_dense_figures_follow_from_the_times() -> None:
    clock = FakeClock(
        **{"sparse_hf, dense": 2.0, "SDPA cuDNN, dense": 2.2, "flash-attn-4, dense": 1.9, "x, dense": 1.0}
    )
    session = make_session(clock, Peer("SDPA cuDNN"), Peer("flash-attn-4"), Peer("x"), Peer("y", refusal="too old"))
    rate, ratio = RUN["dense-forward"](session, OPTIONS, TINY)
    flops = useful_flops(TINY, AttentionLayout.dense(2), "forward")
    assert (rate.value, rate.baseline) == pytest.approx((flops / 2e9, flops / 1.9e9))
    assert ratio.value == pytest.approx(1.9 / 2) and not ratio.lower_is_better
    assert ratio.case.endswith("rate against the best of SDPA cuDNN, flash-attn-4")
    assert [(a.contender, a.reason, a.failed) for a in session.absences] == [("y, dense", "too old", False)]
    ours = next(m for m in session.measurements if m.is_ours)
    assert ratio_to_best_peer(ours, session.measurements) == pytest.approx(0.5)  # x counts here
    assert ours.relative_error is not None and ours.relative_error < 1e-2 and ours.backend == "reference"


def test_bounds_hold_where_they_were_set() -> None:
    assert set(BOUND_LENGTHS) == set(CASES) == set(RUN)
    bound, standard = Bound(0.9, 1.8), Options()
    assert standard.bound(bound, "dense-forward", 16384, 128) == bound
    assert standard.bound(bound, "dense-forward", 4096, 128) is None
    assert standard.bound(bound, "dense-forward", 16384, 256) is None
    assert Options(num_heads=16).bound(bound, "dense-forward", 16384, 128) is None
    small = standard.bound(bound, "dense-forward", 16384, 64)
    assert small is not None and (small.must, small.goal) == pytest.approx((0.81, 1.62))
    slow = replace(bound, lower_is_better=True).at(64)
    assert slow is not None and slow.must == pytest.approx(1.0)
    for case, (first, last) in BOUND_LENGTHS.items():
        assert any(first <= length <= last for length in FULL[128][case]), f"{case} never meets its bound"


def test_verdicts() -> None:
    def judged(value: float, lower: bool) -> str:
        must, goal = (1.1, 1.0) if lower else (0.9, 1.0)
        return verdict(Figure(case="x", value=value, unit="ratio", lower_is_better=lower, must=must, goal=goal))

    assert [judged(x, False) for x in (0.89, 0.9, 1.0)] == ["below", "must", "goal"]
    assert [judged(x, True) for x in (1.11, 1.1, 1.0)] == ["below", "must", "goal"]
    assert verdict(Figure(case="x", value=1, unit="ms", lower_is_better=True)) == ""


def test_streaming_is_compared_with_a_window_without_sinks() -> None:
    clock = FakeClock(**{"sparse_hf, 64 sinks + W=1024": 0.8, "flash-attn-4, W=1024": 1.0})
    session = make_session(clock, Peer("flash-attn-4"), Peer("FlexAttention"))
    figures = {f.case: f for f in RUN["streaming-backward"](session, OPTIONS, replace(TINY, seq_len=1300))}
    title = "streaming 64 sinks + W=1024 backward, 1300 tokens, head_dim 16"
    assert figures[f"{title}: time against flash-attn-4's W=1024 without sinks"].value == pytest.approx(0.8)
    assert figures[f"{title}: rate against FlexAttention"].value == pytest.approx(1 / 0.8)
    found = {(m.contender, m.work): m.density for m in session.measurements}
    assert set(found) == {
        ("sparse_hf", "64 sinks + W=1024"),
        ("FlexAttention", "64 sinks + W=1024"),
        ("flash-attn-4", "W=1024"),
    }
    assert found["flash-attn-4", "W=1024"] < found["sparse_hf", "64 sinks + W=1024"]


def test_blocks_give_the_share_of_the_dense_rate() -> None:
    shape = replace(TINY, seq_len=1024)
    clock = FakeClock(**{"sparse_hf, dense": 1.0, "sparse_hf, keep 25%": 0.5})
    session = make_session(clock)
    figures = {f.case: f for f in RUN["blocks-forward"](session, OPTIONS, shape)}
    share = figures["random 128-blocks keep 25% forward, 1024 tokens, head_dim 16: share of own dense rate"]
    assert share.value == pytest.approx(density(random_blocks(2, 1024, 0.25), 1024) / 0.5) and share.unit == "share"


def test_times_against_sums_and_both_branches() -> None:
    times = {
        "sparse_hf, half dense, half streaming": 3.0,
        "sparse_hf, its dense heads": 2.0,
        "sparse_hf, its streaming heads": 0.5,
        "sparse_hf two-branch, two branches": 4.4,
        "sparse_hf, dense": 4.0,
        "SDPA, dense": 5.0,
        "scoring + selection": 0.1,
    }
    session = make_session(FakeClock(**times))
    assert RUN["mixed-heads"](session, OPTIONS, TINY)[1].value == pytest.approx(3.0 / 2.5)
    assert RUN["two-branch"](session, OPTIONS, TINY)[1].value == pytest.approx(1.1)
    assert RUN["overhead"](session, OPTIONS, TINY)[1].value == pytest.approx(0.8)
    assert not session.absences
    errors = {m.work: m.relative_error for m in session.measurements if m.direction == "both"}
    assert errors["two branches"] is not None and errors["two branches"] < 1e-2


def test_wrong_results_are_no_figures() -> None:
    session = make_session(None, Peer("SDPA cuDNN", factor=1.05))
    figures = RUN["dense-forward"](session, OPTIONS, TINY)
    assert [f.unit for f in figures] == ["TFLOP/s"] and figures[0].baseline is None
    assert session.absences[0].reason.startswith("wrong: output of 160 tokens differs by 5.")
    assert not session.absences[0].failed, "a peer's failure is not ours"


@pytest.mark.parametrize(("case", "what"), [("dense-forward", "output"), ("dense-backward", "output and gradients")])
def test_our_own_wrong_results_fail_the_run(monkeypatch: pytest.MonkeyPatch, case: str, what: str) -> None:
    bind = SparseHF.bind

    def spoiled(self: SparseHF, *args: Tensor) -> Call:
        call = bind(self, *args)
        return replace(call, forward=lambda: call.forward() * 1.02)

    monkeypatch.setattr(SparseHF, "bind", spoiled)
    session = make_session()
    options = replace(OPTIONS, cases=(case,), seq_lens=(160,), head_dims=(16,))
    result = run_kernels(options, session, peers=lambda lengths: ())
    assert result.failed and session.absences[0].reason.startswith(f"wrong: {what} of 160 tokens")
    assert [f.unit for f in result.figures] == ["TFLOP/s"], "the matmul alone"


def test_a_case_that_raises_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figure_keys: set[str]
) -> None:
    def broken(*args: object) -> list[Figure]:
        raise KeyError("a defect")

    monkeypatch.setitem(RUN, "overhead", broken)
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    options = replace(OPTIONS, cases=("overhead", "dense-forward"), seq_lens=(160,), head_dims=(64,))
    steps: list[str] = []
    counts: list[int] = []
    result = run_kernels(
        options,
        make_session(),
        peers=lambda lengths: [Peer("SDPA cuDNN")],
        progress=steps.append,
        after_step=lambda so_far: counts.append(len(so_far.figures)),
    )
    assert counts == [1, 1, 3], "what was measured can be saved after every step"
    assert result.failed and result.session.absences[0].reason == "KeyError: 'a defect'"
    assert steps == [
        "matmul, the ceiling",
        "overhead, 160 tokens, head_dim 64",
        "dense-forward, 160 tokens, head_dim 64",
    ]
    written = write_result(result, options, tmp_path / "new")
    assert {path.name for path in written} >= {"kernels.json", "kernels.csv"}
    rows = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert len(rows) == 3 and all(set(row) == figure_keys for row in rows)
    assert rows[0]["commit"] == "0123456789ab"
    assert rows[0]["command"] == (
        "sparse-hf bench kernels --cases overhead,dense-forward --seq-lens 160 --head-dim 64 --heads 4 --kv-heads 2"
    )
    with (tmp_path / "new" / "kernels.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    ours = next(row for row in table if row["contender"] == "sparse_hf")
    assert ours["ratio_to_best_peer"] == "1" and ours["rounds"] == "5" and ours["density"] == "1"
    assert float(ours["useful_tflops"]) > 0 and float(ours["share_of_matmul"]) > 0
    assert table[-1]["absent_because"] == "KeyError: 'a defect'" and table[-1]["median_ms"] == ""


def test_plots_show_every_contender(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = replace(OPTIONS, cases=("dense-forward", "blocks-forward"), seq_lens=(160, 256), head_dims=(64,))
    result = run_kernels(options, make_session(), peers=lambda lengths: [Peer("SDPA cuDNN")])
    written = write_result(result, options, tmp_path)
    names = ["kernels_lengths_64.png", "kernels_density_64.png"]
    assert [path.name for path in written[2:]] == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_nothing_measured_is_an_error(tmp_path: Path) -> None:
    session = replace(make_session(), matmul_size=-1)
    options = replace(OPTIONS, cases=("triton-dense",), seq_lens=(160,), head_dims=(128,))
    result = run_kernels(options, session, peers=lambda lengths: ())
    with pytest.raises(ValueError, match="nothing could be measured: RuntimeError"):
        write_result(result, options, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_peers_say_what_they_cannot_do() -> None:
    shape, dense = Shape(seq_len=256), AttentionLayout.dense(8)
    window, sinks = uniform(HeadPattern(window=9), 8), uniform(streaming(9), 8)
    assert Sdpa("x").refuses(shape, dense) is None and Sdpa("x").refuses(shape, window)
    assert "plain windows" in (FlashAttention4().refuses(shape, sinks) or "")
    assert "compiled for 512 here" in (Flex((512,)).refuses(shape, dense) or "")
    assert "multiples of 128" in (Flex().refuses(replace(shape, seq_len=200), dense) or "")
    mixed = AttentionLayout(patterns=(HeadPattern(), streaming(9)) * 4)
    assert "these differ" in (Flex().refuses(shape, mixed) or "") and Flex().refuses(shape, sinks) is None
    assert "no fused kernel" in (SparseHF(device="cuda").refuses(replace(shape, dtype=torch.float64), dense) or "")


@pytest.mark.parametrize(
    "layout",
    [
        AttentionLayout.dense(2),
        uniform(streaming(200, 64), 2),
        uniform(HeadPattern(window=129), 2),
        uniform(streaming(1, 128), 2),
        random_blocks(2, 1024, 0.3),
    ],
)
def test_flex_masks_cover_what_the_layout_keeps(layout: AttentionLayout) -> None:
    """Every kept pair lies in a listed block, a full block keeps all pairs, and a partial one those of the mask."""
    seq_len, size = 1024, 128
    mask = flex_block_mask(layout, seq_len, 4, CPU)
    rows = torch.arange(seq_len)
    for head in range(mask.kv_num_blocks.shape[1]):
        pattern = layout.patterns[head // 2]
        keeps = layout.allowed(pattern, rows[:, None], rows[None]) & (rows[None] <= rows[:, None])
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


def test_flex_wants_blocks_of_128() -> None:
    blocks = BlockList.from_mask(torch.eye(4, dtype=torch.bool), 64)
    with pytest.raises(ValueError, match="blocks of 128 here, got 64"):
        flex_block_mask(uniform(HeadPattern(blocks=blocks), 2), 256, 4, CPU)


def test_rates_without_a_rival_have_no_ratio() -> None:
    session = make_session()
    RUN["dense-forward"](session, OPTIONS, TINY)
    (figure,) = rate_figures("x", session.measurements[0], [], Bound(1, 1))
    assert figure.baseline is None and figure.unit == "TFLOP/s"
    assert csv_rows(session)[0]["ratio_to_best_peer"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("kernels", "needs a CUDA device"),
        ("kernels --cases dense-forward,none", "unknown cases none; known: dense-forward"),
        ("kernels --seq-lens 4k", "--seq-lens takes whole numbers"),
        ("kernels --kv-heads 5", "query heads must be a multiple of KV heads"),
        ("kernels --head-dim -1", "must be positive"),
        ("patterns", "needs a CUDA device"),
        ("patterns --patterns window,none", "unknown patterns none; known: window, block-sparse, dilated, triangle"),
        ("patterns --seq-lens 4k", "--seq-lens takes whole numbers"),
        ("patterns --kv-heads 5", "query heads must be a multiple of KV heads"),
        ("methods", "needs a CUDA device"),
        ("methods --methods streaming,none", "unknown methods none; known: dense, sliding_window, streaming"),
        ("methods --head-dim 8", "needs a CUDA device"),
    ],
)
def test_errors_take_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    line: str,
    words: str,
) -> None:
    """Of every benchmark, before anything is written."""
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["sparse-hf", "bench", *line.split(), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    assert end.value.code == 1 and captured.out == "" and not out.exists()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """Real clocks and peers on short inputs."""
    options = Options(cases=("dense-forward", "streaming-backward"), seq_lens=(2048,), head_dims=(64,), quick=True)
    result = run_kernels(options, cuda_session(options))
    assert not result.failed, result.session.absences
    assert {m.contender for m in result.session.measurements} >= {"sparse_hf", "SDPA flash"}
    assert all(m.ms > 0 and m.peak_mib is not None for m in result.session.measurements)
    assert (tmp_path / "kernels.json") in write_result(result, options, tmp_path)
