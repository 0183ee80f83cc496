"""The model card: what it says, and that odd training records or a missing matplotlib do not break it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sparse_hf.plots as plots
from sparse_hf import LayerRule, SlidingWindow, SparseConfig, Streaming
from sparse_hf.adapters import ModelShape
from sparse_hf.artefact import write_artefact
from sparse_hf.model_card import head_map_text, write_model_card
from sparse_hf.plots import plot_head_masks

SHAPE = ModelShape(model_type="llama", num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16)
MASKS = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
CONFIG = SparseConfig(
    sparse=Streaming(num_sink_tokens=4, window_size=16),
    rules=(LayerRule(layers="0", sparse=SlidingWindow(window_size=7)),),
    min_seq_len=512,
)
TRAINING = {
    "stage": "masks",
    "objective": "kl",
    "steps": 160,
    "data": [{"source": "books", "weight": 0.5}],
    "figures": [
        {"case": "needle", "value": 0.123456789, "unit": "exact match"},
        {"case": "a | b", "value": 1, "baseline": "dense"},
    ],
    "note": "line one\nline two",
}
PNG = b"\x89PNG"


def card(tmp_path: Path, name: str = "artefact", **changes: Any) -> str:
    values: dict[str, Any] = {
        "config": CONFIG,
        "head_masks": MASKS,
        "shape": SHAPE,
        "base_model_name_or_path": "user/model-8b",
        "training": TRAINING,
    }
    return (write_artefact(tmp_path / name, **{**values, **changes}) / "README.md").read_text()


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_what_it_says(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert front_matter(text) == {
        "library_name": "sparse_hf",
        "base_model": "user/model-8b",
        "tags": ["sparse-attention"],
    }
    for expected in (
        "# Sparse attention for model-8b",
        "6 of 12 KV heads (50.0%)",
        "`streaming`",
        "num_sink_tokens = 4, window_size = 16",
        "`dense`: all earlier keys",
        "512 tokens",
        '"window_size": 7',
        "| stage | masks |",
        "| steps | 160 |",
        "| note | line one line two |",
        "| case | value | unit | baseline |",
        "| needle | 0.123457 | exact match |  |",
        "| a \\| b | 1 |  | dense |",
        "AutoSparseModelForCausalLM.from_pretrained(artefact)",
        'AutoModelForCausalLM.from_pretrained("user/model-8b")',
        "sparsify(model, artefact)",
    ):
        assert expected in text, expected
    assert "    0  █··█    50.0%\n    1  ····   100.0%\n    2  ████     0.0%" in text


@pytest.mark.parametrize("base", ["", "/data/models/x", "./x", "x", "user/a/b"])
def test_a_base_model_that_is_no_hub_id(tmp_path: Path, base: str) -> None:
    assert "base_model" not in front_matter(card(tmp_path, base_model_name_or_path=base or "."))


def test_a_relative_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card(tmp_path, base_model_name_or_path="models/x"))


@pytest.mark.parametrize(
    "training",
    [
        None,
        {},
        {"figures": []},
        {"figures": "none yet"},
        {"figures": {"needle": 1.0}},
        {"figures": [1, 2]},
        {"figures": [{}], "data": None, "steps": 1.5, "stage": True},
        {"data": ["x" * 1000]},
    ],
)
def test_odd_training_records(tmp_path: Path, training: Any) -> None:
    text = card(tmp_path, training=training)
    assert "## Use" in text
    assert max(len(line) for line in text.splitlines()) < 500


@pytest.mark.parametrize("scores", [None, torch.rand(3, 4)])
def test_the_image_is_linked(tmp_path: Path, scores: torch.Tensor | None) -> None:
    pytest.importorskip("matplotlib")
    text = card(tmp_path, scores=scores)
    assert "(head_masks.png)" in text
    assert (tmp_path / "artefact" / "head_masks.png").read_bytes().startswith(PNG)
    assert ("learned score" in text) == (scores is not None)


def test_without_matplotlib_the_text_map_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    monkeypatch.setattr("sparse_hf.model_card.has_matplotlib", lambda: False)
    text = card(tmp_path)
    assert "█··█" in text and "png" not in text
    assert not (tmp_path / "artefact" / "head_masks.png").exists()
    with pytest.raises(ImportError, match=r'pip install "sparse-hf\[train\]"'):
        plot_head_masks(MASKS, tmp_path / "x.png")


def test_no_heat_map_on_request(tmp_path: Path) -> None:
    card(tmp_path)
    text = write_model_card(tmp_path / "artefact", heat_map=False).read_text()
    assert "█" not in text and "png" not in text
    assert "    0   50.0%" in text


def test_plots_leave_global_state_alone(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    assert plot_head_masks(MASKS, tmp_path / "a.png", torch.rand(3, 4)).read_bytes().startswith(PNG)
    assert plot_head_masks(torch.ones(80, 1), tmp_path / "b.svg").exists()
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before
    with pytest.raises(ValueError, match=r"scores must be \[3, 4\]"):
        plot_head_masks(MASKS, tmp_path / "c.png", torch.rand(2, 2))
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        plot_head_masks(MASKS, tmp_path / "c.xyz")


def test_wide_and_narrow_maps() -> None:
    assert head_map_text(torch.tensor([[1]])).splitlines() == ["layer  heads  sparse", "    0  █        0.0%"]
    assert len(set(map(len, head_map_text(torch.zeros(2, 32)).splitlines()))) == 1


def test_full_heads_with_a_method_of_their_own(tmp_path: Path) -> None:
    assert "the others read every key" in card(tmp_path, name="dense", config=SparseConfig(head_masks="file"))
    text = card(tmp_path, name="xattention", config=SparseConfig(full="xattention", head_masks="file"))
    assert "the others full heads, with methods of their own" in text and "read every key" not in text
