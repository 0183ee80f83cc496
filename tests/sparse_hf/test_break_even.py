"""Break-even lengths: how they follow from times, the files that hold them, and `min_seq_len="auto"`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparse_hf import (
    Dense,
    LayerRule,
    SlidingWindow,
    SparseConfig,
    Streaming,
    XAttention,
    print_sparsity_summary,
    set_head_masks,
    sparsify,
    sparsity_summary,
    unsparsify,
)
from sparse_hf import break_even as lookup
from sparse_hf.break_even import ALWAYS_DENSE, break_even, break_even_tokens, described, resolve_min_seq_len
from sparse_hf.cli.app import build_app
from sparse_hf.patching import get_handle
from sparse_hf_kernels import AttentionLayout, TokenPositions, sparse_attention_reference
from sparse_hf_kernels.tiles import RowGeometry, TileShape, backward_table, forward_table

CPU = torch.device("cpu")
STREAMING, WIDE = Streaming(), Streaming(window_size=4096)
XATTENTION = {"block_size": 128, "stride": 16, "threshold": 0.9, "sparsity_ratio": None}
TINY_PARAMETERS = {"num_sink_tokens": 2, "window_size": 6}
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
    use(entry(arch="cpu", head_dim=16, tokens=16, device="my CPU", parameters=TINY_PARAMETERS))
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


def test_other_parameters_are_said_once(use: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    use(
        entry(arch="cpu", tokens=256),
        entry(arch="cpu", tokens=512, parameters={"num_sink_tokens": 64, "window_size": 4096}),
        entry(arch="cpu", method="xattention", parameters=XATTENTION, tokens=8192),
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            config = SparseConfig(sparse=Streaming(window_size=99), min_seq_len="auto")
            assert resolve_min_seq_len(config, device=CPU, head_dim=128).min_seq_len == 512
    said, starts = warnings_of(caplog)
    assert '"window_size": 99} on cpu' in said and "512 tokens, with {" in said and '"window_size": 4096}' in said
    assert """tune break-even --method '{"method": "streaming", "num_sink_tokens": 64, "window_size": 99}'""" in said
    assert starts.startswith("sparse attention starts at 512 tokens")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config = SparseConfig(full=XAttention(), min_seq_len="auto")
        assert resolve_min_seq_len(config, device=CPU, head_dim=128).min_seq_len == 8192
        (starts,) = warnings_of(caplog)
        assert starts.startswith("sparse attention starts at 8192 tokens; queries before are dense (xattention {")
        config = SparseConfig(full=XAttention(threshold=(0.5,) * 32), min_seq_len="auto")
        assert resolve_min_seq_len(config, device=CPU, head_dim=128).min_seq_len == 8192
    assert '"threshold": "32 values"' in warnings_of(caplog)[-1]


def test_auto_that_never_pays_stays_dense(use: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    use(entry(arch="cpu", head_dim=16, tokens=None, parameters=TINY_PARAMETERS))
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
