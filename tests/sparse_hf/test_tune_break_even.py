"""`sparse-hf tune break-even` without a GPU: which lengths are timed, what follows from the times, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from sparse_hf import Dense, Explicit, Streaming, Triangle, XAttention
from sparse_hf import break_even as lookup
from sparse_hf.bench.contenders import Call, SparseHF
from sparse_hf.bench.session import Session
from sparse_hf.bench.testing import FakePeer
from sparse_hf.bench.timing import Sample
from sparse_hf.bench.workload import Shape, make_inputs
from sparse_hf.break_even import ALWAYS_DENSE, break_even
from sparse_hf.cli.app import build_app
from sparse_hf.methods import available_methods
from sparse_hf.tune.break_even import (
    OWN_DENSE,
    BreakEvenOptions,
    Measured,
    measurable_methods,
    method_of,
    methods_of,
    tune_break_even,
    write_break_even_table,
)
from sparse_hf.tune.ratios import HOST_COUNTS_BELOW_MS, InLayer, Job, _paired, layer_products, time_ratios
from sparse_hf_kernels import AttentionLayout

CPU = torch.device("cpu")
TINY = Streaming(num_sink_tokens=2, window_size=6)
CHOOSES = XAttention(block_size=64, stride=4, threshold=0.5)
OPTIONS = BreakEvenOptions(
    methods=(TINY,), lengths=(384, 128, 256), num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32"
)
Times = Callable[[int, str], float]


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table of the machine's, and nothing left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(lookup.VARIABLE, raising=False)
    lookup.measured.cache_clear()
    yield
    lookup.measured.cache_clear()


@dataclass
class FakeClock:
    """Times by the tokens of the step, which `progress` says, and the label; it runs each call once."""

    times: Times
    tokens: int = 0

    def record(self, label: str, call: Callable[[], object]) -> float:
        return self.times(self.tokens, label)

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)


@dataclass(frozen=True)
class Refusing:
    name: str = "broken"

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return "not today"

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        raise AssertionError("it refused")


def of_tokens(text: str) -> int:
    return int(text.split(", ")[1].split()[0])


def run(
    times: Times, options: BreakEvenOptions = OPTIONS, chain: Times | None = None
) -> tuple[list[Measured], list[str], Session]:
    clocks = FakeClock(times), FakeClock(chain or times)
    session = Session(device=CPU, clock=clocks[0], chain_clock=clocks[1], peers=(FakePeer("flash"),), budget_ms=1)
    lines: list[str] = []

    def progress(text: str) -> None:
        lines.append(text)
        for clock in clocks:
            clock.tokens = of_tokens(text)

    return list(tune_break_even(options, session, progress=progress)), lines, session


def by_length(ours: Mapping[int, float], dense: float = 10.0) -> Times:
    """Ours at the lengths given, those between like the shorter one; dense attention is no faster than `dense`."""

    def time(tokens: int, label: str) -> float:
        if label == "flash, dense":
            return dense
        return 2 * dense if label.endswith(", dense") else dense * ours[max(n for n in ours if n <= tokens)]

    return time


def test_measured_against_the_fastest_dense_from_the_longest_down(tmp_path: Path) -> None:
    (result,), lines, session = run(by_length({128: 1.5, 256: 0.95, 384: 0.9}))
    assert result.ratios == ((128, 1.5), (256, 0.95), (384, 0.9)) and result.tokens == 256 and result.arch == "cpu"
    assert [of_tokens(line) for line in lines] == [384, 256, 128, 128, 256, 384]
    assert [line.endswith("as deployed") for line in lines] == [False] * 3 + [True] * 3
    assert dict(result.deployed_ratios) == {128: 1.5, 256: 0.95, 384: 0.9} and result.worst == (128, 1.5)
    assert session.absences == []


def test_lengths_below_a_slow_one_are_not_measured() -> None:
    (result,), lines, _ = run(by_length({128: 0.1, 256: 1.01, 384: 0.9}))
    assert result.tokens == 384 and [length for length, _ in result.ratios] == [256, 384]
    (never,), lines, _ = run(by_length({128: 0.1, 384: 1.2}))
    assert never.tokens is None and [of_tokens(line) for line in lines] == [384, 128, 384], "deployed it is dense"


def test_where_every_key_is_read_nothing_is_measured() -> None:
    wide = replace(TINY, window_size=200)
    (result,), lines, _ = run(by_length({128: 9.0, 256: 0.9}), replace(OPTIONS, methods=(wide,)))
    assert result.tokens == 0 and [length for length, _ in result.ratios] == [256, 384]
    assert [of_tokens(line) for line in lines[2:]] == [128, 256, 384], "202 tokens are dense; from 203 on it is sparse"
    with pytest.raises(ValueError, match=r"no method could be measured \(streaming: reads every key of up to 502 tok"):
        run(by_length({128: 1.0}), replace(OPTIONS, methods=(replace(TINY, window_size=500),)))


def test_what_is_deployed_must_be_fast_just_after_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length rises until it is."""
    seen: list[tuple[int, int]] = []

    def ratios(session: Session, shape: Shape, jobs: Mapping[str, Job], in_layer: bool = False) -> dict[str, float]:
        label, (_, rows) = next(iter(jobs.items()))
        assert in_layer == (len(seen) >= 4), "what is deployed counts within its layer"
        seen.append((shape.seq_len, rows))
        if not rows:
            return {label: 0.9 if shape.seq_len >= 512 else 1.2}
        return {label: 1.03 if rows == 512 and 512 < shape.seq_len <= 640 else 1.02}

    monkeypatch.setattr("sparse_hf.tune.break_even.time_ratios", ratios)
    options = replace(OPTIONS, lengths=(256, 512, 1024, 2048))
    (result,), _, _ = run(by_length({128: 1.0}), options)
    assert result.tokens == 1024
    assert seen[:4] == [(2048, 0), (1024, 0), (512, 0), (256, 0)]
    assert seen[4:9] == [(256, 512), (512, 512), (640, 512), (768, 512), (1024, 512)]
    assert seen[9:10] == [(640, 512)], "too slow twice"
    assert seen[10:] == [(256, 1024), (1024, 1024), (1152, 1024), (1536, 1024), (2048, 1024)]
    assert [length for length, _ in result.deployed_ratios] == [256, 1024, 1152, 1536, 2048]
    monkeypatch.setattr(
        "sparse_hf.tune.break_even.time_ratios",
        lambda session, shape, jobs, in_layer=False: {
            label: 0.9 if not rows else 1.1 for label, (_, rows) in jobs.items()
        },
    )
    dense_first = replace(TINY, window_size=300)
    (never_slow,), _, _ = run(by_length({128: 1.0}), replace(options, methods=(dense_first,)))
    assert never_slow.tokens == 0 and never_slow.worst[1] == 0.9


def test_ratios_are_those_of_a_round() -> None:
    """A clock that sinks between rounds changes nothing; a single slow call does not count."""
    assert _paired(Sample((9.0, 18.0, 18.0)), Sample((10.0, 20.0, 20.0))) == 0.9
    assert _paired(Sample((2.0, 2.2, 8.0)), Sample((2.0, 2.0, 2.0))) == pytest.approx(1.1)


def test_what_seems_too_slow_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that was slow once, under a sunken clock, does not count."""
    found = iter([1.03, 1.01])

    def ratios(session: Session, shape: Shape, jobs: Mapping[str, Job], in_layer: bool = False) -> dict[str, float]:
        label, (_, rows) = next(iter(jobs.items()))
        if not rows:
            return {label: 0.9 if shape.seq_len >= 512 else 1.2}
        return {label: next(found) if shape.seq_len == 640 else 1.0}

    monkeypatch.setattr("sparse_hf.tune.break_even.time_ratios", ratios)
    (result,), _, _ = run(by_length({128: 1.0}), replace(OPTIONS, lengths=(256, 512, 1024)))
    assert result.tokens == 512 and dict(result.deployed_ratios)[640] == 1.01


def test_our_own_dense_attention_sets_the_limit_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """More dense rows would not mend that."""
    own = 1.05
    slow_calls: list[float] = []

    def ratios(session: Session, shape: Shape, jobs: Mapping[str, Job], in_layer: bool = False) -> dict[str, float]:
        label, (_, rows) = next(iter(jobs.items()))
        if not rows:
            return {label: 0.9 if shape.seq_len >= 512 else 1.2}
        assert jobs[OWN_DENSE] == (Dense(), 0)
        return {
            label: 1.06 if shape.seq_len == 640 else 1.0,
            OWN_DENSE: slow_calls.pop() if slow_calls and shape.seq_len == 640 else own,
        }

    monkeypatch.setattr("sparse_hf.tune.break_even.time_ratios", ratios)
    options = replace(OPTIONS, lengths=(256, 512, 1024))
    (result,), _, _ = run(by_length({128: 1.0}), options)
    assert result.tokens == 512
    own = 1.03
    (result,), _, _ = run(by_length({128: 1.0}), options)
    assert result.tokens == 1024
    slow_calls.append(1.05)  # once under a sunken clock: the limit stays that of the better time
    (result,), _, _ = run(by_length({128: 1.0}), options)
    assert result.tokens == 1024


def test_the_longest_length_is_the_last_at_which_sparsity_can_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sparse_hf.tune.break_even.time_ratios",
        lambda session, shape, jobs, in_layer=False: {
            label: 0.9 if not rows and shape.seq_len > 128 else 1.1 for label, (_, rows) in jobs.items()
        },
    )
    (result,), _, _ = run(by_length({128: 1.0}), replace(OPTIONS, lengths=(128, 256, 512)))
    assert result.tokens == 512, "beyond the longest nothing is known against it"


def test_a_layer_runs_its_products_before_its_attention() -> None:
    """Those of q, k, v and output projections and of an MLP of 3.5 times the hidden size, for both sides alike."""
    shape = Shape(seq_len=256, num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    sizes: list[tuple[int, ...]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                sizes.append((*args[0].shape, args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    products = layer_products(shape, torch.device("cpu"))
    with Count():
        products()
    assert sizes == [(256, 32, out) for out in (32, 16, 16, 32, 112, 112)] + [(256, 112, 32)]
    calls: list[str] = []
    q, k, v = make_inputs(shape, torch.device("cpu"))
    layout = AttentionLayout.dense(1)
    inner = SparseHF(device="cpu")
    call = InLayer(attention=inner, products=lambda: calls.append("products")).bind(q, k, v, layout)
    torch.testing.assert_close(call.forward(), inner.bind(q, k, v, layout).forward())
    assert calls == ["products"]


def test_all_methods_share_the_dense_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dynamic and two static methods, of one of which there are two; each against what the reference says of it."""
    wide = replace(TINY, window_size=9)
    labels = {json.dumps(TINY.to_dict()): 0.9, json.dumps(wide.to_dict()): 1.1, "xattention": 0.8}
    options = replace(OPTIONS, methods=(TINY, wide, CHOOSES))
    assert list(options.labels) == list(labels)
    counted: list[str] = []

    def time(tokens: int, label: str) -> float:
        counted.append(label)
        return next((10 * ratio for name, ratio in labels.items() if label.endswith(name)), 10.0)

    results, lines, session = run(time, options)
    assert session.absences == [] and [result.method for result in results] == [TINY, wide, CHOOSES]
    assert [result.tokens for result in results] == [0, None, 0]
    assert [length for length, _ in results[2].ratios] == [256, 384], "128 tokens are the two forced blocks"
    assert lines[:3] == ["16, 384 tokens, 3 methods", "16, 256 tokens, 2 methods", "16, 128 tokens, 1 methods"]
    assert counted.count("flash, dense") < counted.count("sparse_hf, xattention") * 3
    path = tmp_path / "new" / "table.json"
    write_break_even_table(path, results)
    monkeypatch.setenv(lookup.VARIABLE, str(path))
    lookup.measured.cache_clear()
    assert break_even("cpu", CHOOSES, 16).is_of(CHOOSES) and break_even("cpu", wide, 16).num_dense_rows == ALWAYS_DENSE
    assert not break_even("cpu", replace(CHOOSES, threshold=0.6), 16).is_of(replace(CHOOSES, threshold=0.6))


@pytest.mark.parametrize("method", [CHOOSES, Triangle(num_sink_tokens=2, window_size=6, num_last_tokens=20)])
@pytest.mark.parametrize("num_dense_rows", [0, 192, ALWAYS_DENSE])
def test_what_is_timed_is_right(method: Any, num_dense_rows: int) -> None:
    """Deployed or not, at lengths that are dense, sparse in part, and sparse: the check of outputs passes."""
    clock = FakeClock(lambda tokens, label: 10.0)
    session = Session(device=CPU, clock=clock, chain_clock=clock, peers=(), budget_ms=1)
    for tokens in (128, 192, 384):
        assert time_ratios(session, OPTIONS.shape(tokens), {"x": (method, num_dense_rows)}) == {"x": 1.0}
    assert session.absences == []
    ours = [m for m in session.measurements if m.work == "x"]
    assert [m.density < 1 for m in ours] == [
        num_dense_rows == 0 and method is not CHOOSES,
        num_dense_rows == 0,
        num_dense_rows < 384,
    ]


def test_the_worse_of_cold_calls_and_calls_in_a_row_counts_where_the_host_does() -> None:
    short = HOST_COUNTS_BELOW_MS / 2
    fast, slow = by_length({128: 0.5}, short), by_length({128: 1.5}, short)
    for cold, chain in ((fast, slow), (slow, fast)):
        (result,), _, _ = run(cold, chain=chain)
        assert result.ratios == ((384, 1.5),) and result.tokens is None
    (result,), _, _ = run(by_length({128: 0.5}), chain=slow)
    assert result.tokens == 0, "long calls hide what the host does"


def test_a_method_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    covers = Explicit(block_size=64, row_ptr=(0, 1, 3), indices=(0, 0, 1))
    results, _, session = run(by_length({128: 0.5}), replace(OPTIONS, methods=(covers, TINY)))
    assert [result.method for result in results] == [TINY]
    (absence,) = session.absences
    assert "explicit" in absence.contender and "covers 128 tokens" in absence.reason


def test_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "ours", lambda session, backend=None: Refusing())
    with pytest.raises(ValueError, match=r"no method could be measured \(.*broken.*not today.*sparse-hf env"):
        run(by_length({128: 0.5}))
    clock = FakeClock(by_length({128: 0.5}))
    session = Session(device=CPU, clock=clock, chain_clock=clock, peers=(), budget_ms=1)
    with pytest.raises(ValueError, match=r"no dense attention ran at 384 tokens \(.*not today"):
        list(tune_break_even(OPTIONS, session))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lengths": (100,)}, "multiples of 128"),
        ({"lengths": ()}, "multiples of 128"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"num_kv_heads": 5}, "cannot be shared out"),
        ({"methods": (Dense(),)}, "dense has no break-even length"),
        ({"methods": (XAttention(threshold=(0.5, 0.6)),)}, "holds 2 values, the layer has 32 query heads"),
    ],
)
def test_wrong_options(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BreakEvenOptions(**values)


def test_methods_by_name_or_json() -> None:
    assert method_of("streaming") == Streaming()
    assert method_of('{"method": "streaming", "window_size": 4096}') == Streaming(window_size=4096)
    assert method_of("bigbird-128").to_dict()["block_size"] == 128
    for text, words in (("stream", "unknown method"), ("{window", "a name or a JSON object"), ("explicit", "explicit")):
        with pytest.raises(ValueError, match=words):
            method_of(text)
    assert {method.name for method in measurable_methods()} == set(available_methods()) - {"dense", "explicit"}
    assert methods_of(["all", "streaming", "longnet"]) == (*measurable_methods(), method_of("longnet"))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two head sizes, one file that keeps what it held."""
    clock = FakeClock(by_length({128: 1.5, 256: 0.9}))
    monkeypatch.setattr(
        "sparse_hf.tune.break_even.break_even_session",
        lambda options: Session(device=CPU, clock=clock, chain_clock=clock, peers=(FakePeer("flash"),), budget_ms=1),
    )

    def tuned(options: Any, session: Session, progress: Callable[[str], object]) -> Iterator[Any]:
        def both(text: str) -> None:
            clock.tokens = of_tokens(text)
            progress(text)

        return tune_break_even(options, session, progress=both)

    monkeypatch.setattr("sparse_hf.tune.break_even.tune_break_even", tuned)
    command = ["tune", "break-even", "--model-shape", "2x1x16", "--dtype", "float32", "--lengths", "128,256,384"]
    command += ["--method", json.dumps(TINY.to_dict())]
    both = [*command, "--head-dim", "8", "--method", json.dumps(CHOOSES.to_dict())]
    shown = CliRunner().invoke(build_app(), both, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert "1.500 at 128" in shown.stdout and "xattention" in shown.stdout and "left out" not in shown.stderr
    path = tmp_path / "cache" / "sparse_hf" / "break_even.json"
    entries = json.loads(path.read_text())["entries"]
    assert f"wrote {path}" in shown.stderr
    assert [(e["method"], e["head_dim"], e["tokens"]) for e in entries] == [
        ("streaming", 16, 256),
        ("xattention", 16, 0),
        ("streaming", 8, 256),
        ("xattention", 8, 0),
    ]
    told = CliRunner().invoke(build_app(), [*command, "--json", "--out", str(path)])
    assert json.loads(told.stdout)[0]["ratios"]["128"] == 1.5 and len(json.loads(path.read_text())["entries"]) == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model-shape", "32x8"), "--model-shape takes query heads x KV heads x head_dim"),
        (("--lengths", "100"), "multiples of 128"),
        (("--method", "nothing"), "unknown method"),
    ],
)
def test_command_line_errors(args: tuple[str, ...], words: str) -> None:
    shown = CliRunner().invoke(build_app(), ["tune", "break-even", *args])
    assert isinstance(shown.exception, ValueError) and words in str(shown.exception)
