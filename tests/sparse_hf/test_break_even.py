"""Break-even lengths: how they follow from times, the files that hold them, and `min_seq_len="auto"`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparse_hf import (
    Dense,
    LayerRule,
    SlidingWindow,
    SparseConfig,
    Streaming,
    print_sparsity_summary,
    set_head_masks,
    sparsify,
    sparsity_summary,
    unsparsify,
)
from sparse_hf import break_even as lookup
from sparse_hf.bench.contenders import Call
from sparse_hf.bench.session import Session
from sparse_hf.bench.workload import Shape
from sparse_hf.break_even import ALWAYS_DENSE, break_even, break_even_tokens, described, resolve_min_seq_len
from sparse_hf.cli.app import build_app
from sparse_hf.patching import get_handle
from sparse_hf.tune.break_even import (
    BreakEvenOptions,
    measurable_methods,
    method_of,
    tune_break_even,
    write_break_even_table,
)
from sparse_hf_kernels import AttentionLayout, TokenPositions, sparse_attention_reference
from sparse_hf_kernels.tiles import RowGeometry, TileShape, backward_table, forward_table

CPU = torch.device("cpu")
STREAMING, WIDE = Streaming(), Streaming(window_size=4096)
TINY_STREAMING = Streaming(num_sink_tokens=2, window_size=6)


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table of the machine's, nothing said yet, and nothing left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(lookup.VARIABLE, raising=False)
    monkeypatch.setattr(lookup, "_said", set())
    lookup.measured.cache_clear()
    yield
    lookup.measured.cache_clear()


def entry(**changes: Any) -> dict[str, Any]:
    values = {"arch": "sm_90", "method": "streaming", "head_dim": 128, "tokens": 2048}
    parameters = {"num_sink_tokens": 64, "window_size": 1024}
    return {**values, "parameters": parameters, "device": "NVIDIA X1", **changes}


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a file of these entries in force."""

    def write(*entries: Any) -> Path:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"format_version": 1, "entries": entries}))
        monkeypatch.setenv(lookup.VARIABLE, str(path))
        lookup.measured.cache_clear()
        return path

    return write


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [
        ([1.3, 1.1, 0.9, 0.5], 1024),
        ([1.3, 0.9, 1.1, 0.5], 2048),  # slower again at 1024
        ([1.3, 1.0, 1.0, 1.0], 512),
        ([0.9, 0.9, 0.9, 0.9], 0),
        ([0.9, 0.9, 0.9, 1.01], None),
        ([0.9, 0.9, 0.9, float("nan")], None),
    ],
)
def test_length_from_ratios(ratios: list[float], tokens: int | None) -> None:
    pairs = list(zip((256, 512, 1024, 2048), ratios, strict=True))
    assert break_even_tokens(pairs) == tokens == break_even_tokens(pairs[::-1])


def test_what_ships_can_be_read() -> None:
    assert isinstance(lookup.measured(), tuple)


def test_look_up(use: Callable[..., Path]) -> None:
    wide = {"num_sink_tokens": 64, "window_size": 4096}
    use(
        entry(),
        entry(parameters=wide, tokens=5120),
        entry(head_dim=64, tokens=None),
        entry(arch="sm_89", tokens=0),
        entry(method="sliding_window", parameters={"window_size": 1024}, tokens=1024),
    )
    assert break_even("sm_90", STREAMING, 128).tokens == 2048
    assert break_even("sm_90", WIDE, 128).tokens == 5120
    assert break_even("sm_90", Streaming(window_size=99), 128).tokens == 5120, "other parameters: the longest"
    assert break_even("sm_90", STREAMING, 64).num_dense_rows == ALWAYS_DENSE
    assert break_even("sm_89", STREAMING, 128).num_dense_rows == 0
    assert break_even("sm_90", SlidingWindow(), 128).tokens == 1024
    with pytest.raises(ValueError, match=r"'streaming' is known for cpu with head_dim 128 \(known: sm_89 with") as told:
        break_even("cpu", STREAMING, 128)
    assert "`sparse-hf tune break-even --method streaming`" in str(told.value)
    with pytest.raises(ValueError, match=r"'sliding_window' is known for sm_89 .*\(known: sm_90 with head_dim 128\)"):
        break_even("sm_89", SlidingWindow(), 128)


def test_the_cache_folder_and_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "sparse_hf"
    folder.mkdir(parents=True)
    (folder / "break_even.json").write_text(json.dumps({"format_version": 1, "entries": [entry(arch="sm_00")]}))
    assert break_even("sm_00", STREAMING, 128).tokens == 2048
    monkeypatch.setenv(lookup.VARIABLE, "")
    lookup.measured.cache_clear()
    with pytest.raises(ValueError, match="no break-even length"):
        break_even("sm_00", STREAMING, 128)
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "none.json"))
    lookup.measured.cache_clear()
    with pytest.raises(ValueError, match=r"none\.json is no file; unset it, or write the file with `sparse-hf tune"):
        lookup.measured()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (7, "an entry is a mapping"),
        (entry(speed=3), r"entry 1: unknown keys \['speed'\]"),
        ({k: v for k, v in entry().items() if k != "tokens"}, r"keys \['tokens'\] are missing"),
        (entry(arch=90), "arch must be a text"),
        (entry(parameters=3), "parameters must be a mapping"),
        (entry(tokens=-1), "tokens must be an integer >= 0"),
        (entry(tokens=1.5), "tokens must be an integer >= 0"),
        (entry(head_dim=0), "head_dim must be an integer >= 1"),
        (entry(head_dim=True), "head_dim must be an integer >= 1"),
    ],
)
def test_malformed_files(use: Callable[..., Path], bad: Any, words: str) -> None:
    path = use(entry(), bad)
    with pytest.raises(ValueError, match=words) as caught:
        lookup.measured()
    assert str(path) in str(caught.value)


@dataclass
class FakeClock:
    """Times by (tokens of the step, label); `factor` spoils those of sparse attention."""

    times: dict[tuple[int, str], float]
    factor: float = 1.0
    tokens: int = 0

    def record(self, label: str, call: Callable[[], object]) -> float:
        time = self.times[self.tokens, label]
        return time * self.factor if label.endswith("sparse") else time

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)


@dataclass(frozen=True)
class Peer:
    name: str = "SDPA flash"
    refusal: str | None = None

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return self.refusal or (None if layout.is_dense else "no pattern")

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        def forward() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return Call(forward=forward, inputs=(q, k, v))


OURS, DENSE, FLASH = "sparse_hf, sparse", "sparse_hf, dense", "SDPA flash, dense"
OPTIONS = BreakEvenOptions(
    methods=(TINY_STREAMING,), lengths=(384, 128, 256), num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32"
)


def fake_session(clock: FakeClock, chain: FakeClock, *peers: Peer) -> tuple[Session, Callable[[str], None], list[str]]:
    session = Session(device=CPU, clock=clock, chain_clock=chain, peers=peers or (Peer(),), budget_ms=1)
    lines: list[str] = []

    def progress(text: str) -> None:
        lines.append(text)
        clock.tokens = chain.tokens = int(text.split(", ")[1].split()[0])

    return session, progress, lines


def times(ours: Sequence[float], dense: Sequence[float], flash: Sequence[float]) -> dict[tuple[int, str], float]:
    columns = ((OURS, ours), (DENSE, dense), (FLASH, flash))
    return {(length, label): row[i] for label, row in columns for i, length in enumerate((128, 256, 384))}


def test_measured_against_the_fastest_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = FakeClock(times(ours=[9, 9, 9], dense=[10, 10, 12], flash=[6, 9.5, 20]))
    session, progress, lines = fake_session(cold, FakeClock(times([1, 1, 1], [1, 1, 1], [1, 1, 1]), factor=0.9))
    (result,) = tune_break_even(OPTIONS, session, progress=progress)
    assert result.ratios == ((128, 1.5), (256, pytest.approx(9 / 9.5)), (384, 0.9))
    assert result.tokens == 256 and result.arch == "cpu"
    assert lines[:3] == ["streaming, 128 tokens", "streaming, 256 tokens", "streaming, 384 tokens"]
    assert lines[3:] == [f"{line}, as deployed" for line in lines[:3]] and len(lines) == OPTIONS.num_steps
    assert result.worst == (128, 1.5) and len(result.deployed_ratios) == 3
    path = tmp_path / "new" / "table.json"
    write_break_even_table(path, [result])
    monkeypatch.setenv(lookup.VARIABLE, str(path))
    lookup.measured.cache_clear()
    found = break_even("cpu", TINY_STREAMING, 16)
    assert found.tokens == 256 and dict(found.parameters) == {"num_sink_tokens": 2, "window_size": 6}


def test_the_worse_of_cold_calls_and_calls_in_a_row_counts() -> None:
    table = times([5, 5, 5], [10, 10, 10], [10, 10, 10])
    for cold, chain in ((1.0, 3.0), (3.0, 1.0)):
        session, progress, _ = fake_session(FakeClock(table, factor=cold), FakeClock(table, factor=chain))
        (result,) = tune_break_even(OPTIONS, session, progress=progress)
        assert [ratio for _, ratio in result.ratios] == [1.5] * 3 and result.tokens is None


def test_dense_last_rows_are_checked_as_such() -> None:
    """The check looks at slices of rows, whose last ones are not the last of the sequence."""
    triangle = method_of('{"method": "triangle", "num_sink_tokens": 2, "window_size": 6, "num_last_tokens": 20}')
    options = replace(OPTIONS, methods=(triangle,))
    clock = FakeClock(times([5, 5, 5], [10, 10, 10], [10, 10, 10]))
    session, progress, _ = fake_session(clock, clock)
    assert next(tune_break_even(options, session, progress=progress)).tokens == 0 and session.absences == []


def test_what_is_deployed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second series has the rows below the length dense."""
    layouts = []

    def note(session: Session, shape: Shape, layout: AttentionLayout) -> float:
        layouts.append((shape.seq_len, layout.num_dense_rows, layout.patterns[0].window))
        return {128: 1.2, 256: 0.9, 384: 0.8}[shape.seq_len]

    monkeypatch.setattr("sparse_hf.tune.break_even.time_ratio", note)
    session, progress, _ = fake_session(FakeClock({}), FakeClock({}))
    assert next(tune_break_even(OPTIONS, session, progress=progress)).tokens == 256
    assert layouts == [(n, rows, 6) for rows in (0, 256) for n in (128, 256, 384)]
    monkeypatch.setattr("sparse_hf.tune.break_even.time_ratio", lambda *rest: 0.5)
    always = next(tune_break_even(OPTIONS, session, progress=progress))
    assert always.tokens == 0 and always.deployed_ratios == always.ratios, "not measured twice"


def test_nothing_to_compare() -> None:
    session, progress, _ = fake_session(FakeClock({}), FakeClock({}), Peer(refusal="not today"))
    session.ours = lambda backend=None: Peer(refusal="broken")  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ValueError, match=r"nothing to compare at 128 tokens \(.*broken"):
        next(tune_break_even(OPTIONS, session, progress=progress))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lengths": (100,)}, "multiples of 128"),
        ({"lengths": ()}, "multiples of 128"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"num_kv_heads": 5}, "cannot be shared out"),
        ({"methods": (Dense(),)}, "dense has no break-even length here"),
    ],
)
def test_wrong_options(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BreakEvenOptions(**values)


def test_methods_by_name_or_json() -> None:
    assert method_of("streaming") == STREAMING
    assert method_of('{"method": "streaming", "window_size": 4096}') == WIDE
    for text, words in (("stream", "unknown method"), ("{window", "a name or a JSON object"), ("explicit", "explicit")):
        with pytest.raises(ValueError, match=words):
            method_of(text)
    names = {method.name for method in measurable_methods()}
    assert {"streaming", "sliding_window"} <= names and not names & {"dense", "explicit"}


def test_configuration() -> None:
    config = SparseConfig(min_seq_len="auto")
    assert config.to_dict()["min_seq_len"] == "auto" and SparseConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match='min_seq_len is "auto"'):
        _ = config.num_dense_rows
    assert SparseConfig(min_seq_len=7).num_dense_rows == 7
    for wrong in ("Auto", -1, 1.5, None):
        with pytest.raises(ValueError, match='min_seq_len must be an integer >= 0 or "auto"'):
            SparseConfig(min_seq_len=wrong)  # type: ignore[arg-type]
    assert described("auto") == "the break-even length of the device" and described(512) == "512 tokens"
    assert described(ALWAYS_DENSE) == "every length"


def test_the_longest_of_all_methods_counts(use: Callable[..., Path]) -> None:
    use(
        entry(arch="cpu", tokens=256),
        entry(arch="cpu", method="sliding_window", parameters={"window_size": 1024}, tokens=384),
    )

    def resolved(**values: Any) -> int:
        config = SparseConfig(min_seq_len="auto", **values)
        return resolve_min_seq_len(config, device=CPU, head_dim=128).num_dense_rows

    assert resolved() == 256
    assert resolved(rules=(LayerRule(layers="0", full=SlidingWindow()),)) == 384
    assert resolved(full=SlidingWindow(), sparse=Dense()) == 384
    assert resolved(sparse=Dense()) == 0
    given = SparseConfig(min_seq_len=3)
    assert resolve_min_seq_len(given, device=CPU, head_dim=128) is given


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
        )
    ).eval()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == lookup.__name__]


def test_auto_on_a_model(use: Callable[..., Path], caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    use(entry(arch="cpu", head_dim=16, tokens=16, device="my CPU"))
    model, tokens = tiny_model(), torch.randint(0, 97, (1, 40))
    config = SparseConfig(sparse=TINY_STREAMING, min_seq_len="auto")
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        dense = model(tokens).logits
        sparsify(model, config)
        auto = model(tokens).logits
        handle = get_handle(model)
        assert handle.config.min_seq_len == "auto" and handle.resolved.min_seq_len == 16
        assert sparsity_summary(model, 40).min_seq_len == 16
        print_sparsity_summary(model, 40)
        assert "dense below 16 tokens" in capsys.readouterr().out
        set_head_masks(model, torch.tensor([[0, 1], [0, 0]]))
        assert {state.layout.num_dense_rows for state in handle.states} == {16}
        unsparsify(model)
        by_hand = sparsify(model, SparseConfig(sparse=TINY_STREAMING, min_seq_len=16))(tokens).logits
        unsparsify(model)
        sparsify(model, config)  # says nothing more
    assert torch.equal(auto, by_hand)
    torch.testing.assert_close(auto[:, :16], dense[:, :16])
    assert (auto[:, 16:] - dense[:, 16:]).abs().max() > 1e-4
    (said,) = warnings_of(caplog)
    assert said.startswith("sparse attention starts at 16 tokens; queries before are dense") and "my CPU" in said


def test_auto_without_an_entry(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = sparsify(tiny_model(), SparseConfig(sparse=TINY_STREAMING, min_seq_len="auto"))
            assert sparsity_summary(model, 40).min_seq_len == 0
    (said,) = warnings_of(caplog)
    assert "'streaming' is known for cpu with head_dim 16" in said and "sparse from the first token on" in said


def test_auto_that_never_pays_stays_dense(use: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    use(entry(arch="cpu", head_dim=16, tokens=None))
    model, tokens = tiny_model(), torch.randint(0, 97, (1, 40))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        dense = model(tokens).logits
        sparsify(model, SparseConfig(sparse=TINY_STREAMING, min_seq_len="auto"))
        torch.testing.assert_close(model(tokens).logits, dense)
    assert sparsity_summary(model, 40).attention_density == 1
    assert warnings_of(caplog)[0].startswith("attention stays dense: sparse was not faster")


def test_always_dense_does_not_overflow() -> None:
    """As many dense rows as there can be, in the reference and in the tile tables of the kernels."""
    pattern = TINY_STREAMING.pattern()
    layout = AttentionLayout(patterns=(pattern,), num_dense_rows=ALWAYS_DENSE)
    dense = AttentionLayout.dense(1)
    where = TokenPositions.causal(300, 300)
    q, k, v = (torch.randn(1, 1, 300, 8) for _ in range(3))
    outputs = [sparse_attention_reference(q, k, v, each, positions=where, scale=1.0)[0] for each in (layout, dense)]
    torch.testing.assert_close(*outputs)
    assert layout.row_counts(pattern, 300).tolist() == list(range(1, 301))
    sizes = dict(batch=1, num_heads=1, head_dim=64, device=CPU)
    for build in (forward_table, backward_table):
        tables = [
            build(each, RowGeometry.of(where), TileShape(rows=64, columns=64), **sizes) for each in (layout, dense)
        ]
        visited = [table.rows[:, 2:8].long().sum() for table in tables]
        assert tables[0].num_tiles == tables[1].num_tiles and visited[0] > 0
        # Ends of the pieces: the last one counts the blocks of a tile.
        assert torch.equal(tables[0].rows[:, 7].sort().values, tables[1].rows[:, 7].sort().values)


def test_inspect_shows_the_resolved_length(tmp_path: Path, use: Callable[..., Path]) -> None:
    arch = lookup.architecture_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    use(entry(arch=arch, head_dim=16, tokens=128))
    tiny_model().config.save_pretrained(tmp_path / "model")
    (tmp_path / "auto.yaml").write_text("sparse: streaming\nmin_seq_len: auto\n")
    command = ["inspect", str(tmp_path / "model"), "--sparse", str(tmp_path / "auto.yaml")]
    told = json.loads(CliRunner().invoke(build_app(), [*command, "--json"], catch_exceptions=False).stdout)
    assert told["min_seq_len"] == 128 and told["config"]["min_seq_len"] == "auto"
    shown = CliRunner().invoke(build_app(), command, catch_exceptions=False).stdout
    assert "dense below 128 tokens" in shown


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = FakeClock(times([9, 9, 9], [10, 10, 12], [6, 9.5, 20]))
    session, _, _ = fake_session(cold, cold)
    monkeypatch.setattr("sparse_hf.tune.break_even.break_even_session", lambda options: session)

    def tuned(options: Any, session: Session, progress: Callable[[str], object]) -> Iterator[Any]:
        def both(text: str) -> None:
            cold.tokens = int(text.split(", ")[1].split()[0])
            progress(text)

        return tune_break_even(options, session, progress=both)

    monkeypatch.setattr("sparse_hf.tune.break_even.tune_break_even", tuned)
    method = json.dumps(TINY_STREAMING.to_dict())
    command = ["tune", "break-even", "--model-shape", "2x1x16", "--method", method, "--dtype", "float32"]
    command += ["--lengths", "128,256,384"]
    shown = CliRunner().invoke(build_app(), command, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert "256" in shown.stdout and "1.500 at 128" in shown.stdout
    path = tmp_path / "cache" / "sparse_hf" / "break_even.json"
    assert f"wrote {path}" in shown.stderr and json.loads(path.read_text())["entries"][0]["tokens"] == 256
    told = CliRunner().invoke(build_app(), [*command, "--json", "--out", str(tmp_path / "x.json")])
    assert json.loads(told.stdout)[0]["ratios"]["128"] == 1.5 and (tmp_path / "x.json").is_file()


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
