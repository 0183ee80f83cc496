"""`sparse-hf inspect METHOD`: exact figures by hand, JSON, files, parameters, and the image."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sparse_hf import BigBird, LocalGlobal, Streaming, XAttention
from sparse_hf.cli import build_app
from sparse_hf.method_report import density_map, method_layout, report_method


def invoke(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build_app(["inspect"]), ["inspect", *map(str, args)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_figures_by_hand() -> None:
    """16 tokens, a window of 4 and 2 sinks; 4 query and 2 KV heads of 8, fp16."""
    report = report_method(
        Streaming(num_sink_tokens=2, window_size=4), 16, num_heads=4, num_kv_heads=2, head_dim=8, bytes_per_element=2
    )
    pairs = sum(min(i + 1, 6) for i in range(16))
    assert (report.stored_entries, report.causal_entries) == (2 * pairs, 2 * 136)
    assert report.density == pairs / 136
    (head,) = report.heads
    assert (head.kv_heads, head.stored_entries, head.mask_bytes, head.kept_tokens) == ((0, 1), pairs, 0, 2 + 3)
    assert (report.kv_bytes, report.dense_kv_bytes) == (2 * 5 * 2 * 8 * 2, 2 * 16 * 2 * 8 * 2)
    assert (report.flops, report.dense_flops) == (4 * pairs * 4 * 8, 4 * 136 * 4 * 8)
    assert report.dense_mask_bytes == 16 * 16


def test_lists_are_counted_per_distinct_pattern() -> None:
    report = report_method(BigBird(block_size=4, num_random_blocks=1), 31, num_heads=4, num_kv_heads=2)
    blocks = 1 + 2 + 3 + 4 * 5  # rows of one, two and three blocks, then first, window of two and a random one
    assert [head.mask_bytes for head in report.heads] == [4 * (blocks + 9)] * 2
    assert report.mask_bytes == 2 * 4 * (blocks + 9)
    assert report.dense_mask_bytes == 2 * 31 * 31


def test_json() -> None:
    shown = json.loads(invoke("triangle", "window_size=16", "--seq-len", "1000", "--json").stdout)
    dense_rows = sum(range(1000 - 128 + 1, 1001))
    entries = sum(min(i + 1, 8 + 16) for i in range(1000 - 128)) + dense_rows
    assert shown["method"]["window_size"] == 16 and shown["seq_len"] == 1000
    assert shown["stored_entries"] == 8 * entries and shown["density"] == pytest.approx(entries / 500500)
    assert shown["kv_bytes"] == shown["dense_kv_bytes"] == 8 * 1000 * 2 * 128 * 2
    shape = ("--num-heads", "6", "--num-kv-heads", "3", "--head-dim", "64", "--dtype", "float32", "--layer", "2")
    shown = json.loads(invoke("local_global", "--seq-len", "9000", *shape, "--json").stdout)
    assert [head["kv_heads"] for head in shown["heads"]] == [[0, 1], [2]]
    assert shown["kv_bytes"] == (2 * 511 + 9000) * 2 * 64 * 4 and shown["layer"] == 2


def test_text() -> None:
    text = invoke("dilated", "segments=[2, 4]", "rates=[1, 2]", "--seq-len", "640").output
    assert "segments=[2, 4]" in text and "640 tokens" in text and "stored entries" in text and "FLOPs" in text


def test_files(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("method: streaming\nwindow_size: 100\n")
    (tmp_path / "m.json").write_text('{"method": "streaming", "window_size": 100}')
    expected = json.loads(invoke("streaming", "window_size=100", "--json").stdout)
    for name in ("m.yaml", "m.json"):
        assert json.loads(invoke(tmp_path / name, "--json").stdout) == expected
    shown = json.loads(invoke(tmp_path / "m.yaml", "window_size=200", "--json").stdout)
    assert shown["method"]["window_size"] == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("xattention",), "xattention is dynamic"),
        (("streaming", "window=3"), r"unknown keys \['window'\]"),
        (("streaming", "window_size"), "given as key=value, got 'window_size'"),
        (("streaming", "window_size=[1"), "not understood"),
        (("streaming", "--num-heads", "3"), "num_kv_heads divide num_heads"),
        (("no-such-artefact/x", "a=1"), "is none"),
    ],
)
def test_errors(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(build_app(["inspect"]), ["inspect", *arguments])
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise result.exception


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    invoke("bigbird", "--seq-len", "2000", "--plot", tmp_path / "map.png", "--json")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("length", [5, 64, 100])
def test_the_map_is_the_mask_at_low_resolution(length: int) -> None:
    """With at most 16 rows a cell nothing is left out."""
    layout = method_layout(LocalGlobal(block_size=4, window_size=8, min_window_size=2), 3)
    pattern = layout.patterns[2]
    shares = density_map(layout, pattern, length, num_cells=10)
    cells = min(10, length)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = layout.allowed(pattern, i, j).double()
    borders = [cell * length // cells for cell in range(cells + 1)]
    for row in range(cells):
        for column in range(cells):
            part = mask[borders[row] : borders[row + 1], borders[column] : borders[column + 1]]
            assert shares[row, column] == pytest.approx(part.mean().item())


def test_dynamic_methods_have_no_figures() -> None:
    with pytest.raises(ValueError, match="xattention is dynamic"):
        report_method(XAttention(), 100)
