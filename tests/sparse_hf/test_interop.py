"""DuoAttention and PruLong tables: read, checked against the model, and written back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import (
    Dense,
    LayerRule,
    SlidingWindow,
    SparseConfig,
    Streaming,
    round_scores,
    save_artefact,
    sparsify,
    sparsity_summary,
)
from sparse_hf.adapters import ModelShape
from sparse_hf.interop import export_duo_attention, import_duo_attention, import_prulong

SHAPE = ModelShape(model_type="llama", num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16)
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture
def gates() -> torch.Tensor:
    return torch.rand(3, 4)


@pytest.fixture
def pattern(tmp_path: Path, gates: torch.Tensor) -> Path:
    """A pattern's folder as DuoAttention's training writes it."""
    folder = tmp_path / "pattern"
    folder.mkdir()
    np.savetxt(folder / "full_attention_heads.tsv", gates.numpy(), delimiter="\t")
    (folder / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256, "lr": 0.02}))
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("as_folder", [True, False])
def test_duo_attention_ranks_its_gates(pattern: Path, gates: torch.Tensor, as_folder: bool) -> None:
    path = pattern if as_folder else pattern / "full_attention_heads.tsv"
    config, masks, scores = import_duo_attention(path, SHAPE)
    assert scores is not None and torch.equal(scores, gates)
    assert torch.equal(masks, round_scores(gates, 0.5)) and int(masks.sum()) == 6
    assert (config.full, config.sparse) == (Dense(), Streaming(num_sink_tokens=128, window_size=256))
    assert config.head_masks == tuple(map(tuple, masks.tolist()))


def test_duo_attention_deploys_other_shares_and_sizes(pattern: Path, gates: torch.Tensor) -> None:
    assert int(import_duo_attention(pattern, SHAPE, 0.75).head_masks.sum()) == 3
    heads = import_duo_attention(pattern, SHAPE, threshold=0.4, num_sink_tokens=64, window_size=200)
    assert torch.equal(heads.head_masks, (gates >= 0.4).long())
    assert heads.config.sparse == Streaming(num_sink_tokens=64, window_size=200)
    assert import_duo_attention(pattern, SHAPE, num_sink_tokens=0).config.sparse == SlidingWindow(window_size=256)
    with pytest.raises(ValueError, match="not both"):
        import_duo_attention(pattern, SHAPE, 0.5, 0.5)
    with pytest.raises(ValueError, match="head_sparsity must lie"):
        import_duo_attention(pattern, SHAPE, 1.5)
    with pytest.raises(ValueError, match="recent_size must be an integer"):
        import_duo_attention(pattern, SHAPE, window_size=0)


def test_duo_attention_without_its_config(pattern: Path) -> None:
    (pattern / "config.json").unlink()
    with pytest.raises(ValueError, match=r"'sink_size'.*pass num_sink_tokens and window_size"):
        import_duo_attention(pattern, SHAPE)
    assert import_duo_attention(pattern, SHAPE, num_sink_tokens=4, window_size=8).config.sparse == Streaming(
        num_sink_tokens=4, window_size=8
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.1\t0.2\t0.3\t0.4\n0.1\tnan\t0.3\t0.4\n", "line 2.*finite.*'nan'"),
        ("0.1\t0.2\t0.3\tinf\n", "line 1.*finite.*'inf'"),
        ("# gates\n0.1\t0.2\t0.3\t0.4\n\n0.1\tmany\t0.3\t0.4\n", "line 4.*numbers separated by tabs.*'many'"),
        ("0.1 0.2 0.3 0.4\n", "line 1.*separated by tabs"),
        ("0.1\t0.2\t0.3\t0.4\n0.1\t0.2\t0.3\n", "line 2: expected 4 columns.*got 3"),
        ("0.1\t0.2\t0.3\t0.4\t\n", "line 1.*got ''"),
        ("\n", "holds no rows"),
        ("0.1\t0.2\t0.3\t0.4\n", r"expected \[layers, kv_heads\] = \[3, 4\].*got \[1, 4\]; import it for the model"),
    ],
)
def test_malformed_tables_name_the_line(pattern: Path, text: str, words: str) -> None:
    write(pattern / "full_attention_heads.tsv", text)
    with pytest.raises(ValueError, match=words):
        import_duo_attention(pattern, SHAPE)


def test_unreadable_tables(pattern: Path, tmp_path: Path) -> None:
    (pattern / "full_attention_heads.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text file"):
        import_duo_attention(pattern, SHAPE)
    with pytest.raises(ValueError, match="no such file"):
        import_duo_attention(tmp_path / "nothing", SHAPE)


def test_windows_line_ends(pattern: Path, gates: torch.Tensor) -> None:
    table = pattern / "full_attention_heads.tsv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    scores = import_duo_attention(pattern, SHAPE).scores
    assert scores is not None and torch.equal(scores, gates)


def test_prulong(tmp_path: Path) -> None:
    table = write(tmp_path / "masks_sp0.5.tsv", "0\t1\n1.0\t0.0\n")
    for path in (table, tmp_path):
        config, masks, scores = import_prulong(path, tiny_llama())
        assert masks.tolist() == [[0, 1], [1, 0]] and scores is None
        assert config.sparse == Streaming(num_sink_tokens=128, window_size=1024)
    heads = import_prulong(table, CONFIG, num_sink_tokens=16, window_size=32)
    assert heads.config.sparse == Streaming(num_sink_tokens=16, window_size=32)
    model = sparsify(tiny_llama(), heads.config)
    assert sparsity_summary(model, 128).head_sparsity == 0.5


def test_prulong_takes_masks_only(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", "0\t1\n0.3\t0\n")
    with pytest.raises(ValueError, match=r"0 and 1, got \[0.3.*import_duo_attention"):
        import_prulong(tmp_path / "a.tsv", CONFIG)
    write(tmp_path / "b.tsv", "0\t1\n")
    with pytest.raises(ValueError, match=r"2 \.tsv files; name the one"):
        import_prulong(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"= \[2, 2\].*got \[1, 2\]"):
        import_prulong(tmp_path / "b.tsv", CONFIG)


@pytest.mark.parametrize("masks", ["ranked", "other", "none"])
def test_export_to_duo_attention_is_exact(tmp_path: Path, masks: str) -> None:
    """Masks always come back; scores too, unless the masks are no ranking of them."""
    scores = torch.tensor([[0.1, 1 / 3], [0.7, 0.7]])
    rows = {"ranked": [[0, 0], [0, 1]], "other": [[1, 0], [0, 1]], "none": [[1, 0], [0, 0]]}[masks]
    config = SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16))
    model = sparsify(tiny_llama(), config, head_masks=torch.tensor(rows))
    folder = save_artefact(
        model, tmp_path / "artefact", scores=None if masks == "none" else scores, base_model_name_or_path="me/base"
    )
    out = export_duo_attention(folder, tmp_path / "pattern")
    heads = import_duo_attention(out, CONFIG)
    assert heads.head_masks.tolist() == rows
    assert heads.config.sparse == config.sparse
    assert heads.scores is not None
    assert torch.equal(heads.scores, scores if masks == "ranked" else torch.tensor(rows).float())
    # What DuoAttention's own loader does.
    loaded = np.loadtxt(out / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    assert np.array_equal(loaded.astype(np.float32), heads.scores.numpy())
    settings = json.loads((out / "config.json").read_text())
    assert (settings["sink_size"], settings["recent_size"]) == (4, 16)


def test_export_of_bare_masks(tmp_path: Path) -> None:
    masks = torch.tensor([[0, 1, 1], [0, 0, 1]])
    with pytest.raises(ValueError, match="pass num_sink_tokens and window_size"):
        export_duo_attention(masks, tmp_path / "out")
    out = export_duo_attention(masks, tmp_path / "out", num_sink_tokens=0, window_size=9)
    shape = ModelShape(model_type="llama", num_layers=2, num_heads=3, num_kv_heads=3, head_dim=16)
    heads = import_duo_attention(out, shape)
    assert torch.equal(heads.head_masks, masks)
    assert heads.config.sparse == SlidingWindow(window_size=9)
    with pytest.raises(ValueError, match="exists already"):
        export_duo_attention(masks, out, num_sink_tokens=0, window_size=9)
    export_duo_attention(1 - masks, out, num_sink_tokens=0, window_size=9, overwrite=True)
    assert torch.equal(import_duo_attention(out, shape).head_masks, 1 - masks)
    with pytest.raises(ValueError, match="of 0 and 1"):
        export_duo_attention(masks * 0.5, tmp_path / "b", num_sink_tokens=0, window_size=9)
    with pytest.raises(ValueError, match="threshold must be a number, got NaN"):
        import_duo_attention(out, shape, threshold=float("nan"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((-1, 9), "num_sink_tokens must be an integer >= 0, got -1"), ((0, 0), "window_size must be an integer >= 1")],
)
def test_what_the_import_refuses_is_not_exported(sizes: tuple[int, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_duo_attention(torch.eye(2), tmp_path / "out", num_sink_tokens=sizes[0], window_size=sizes[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SparseConfig(sparse=Dense()), "sparse heads are 'dense'"),
        (SparseConfig(min_seq_len=5), "without rules or min_seq_len"),
        (SparseConfig(rules=(LayerRule(layers="0", sparse=Dense()),)), "without rules"),
    ],
)
def test_export_refuses_what_duo_attention_cannot_say(tmp_path: Path, config: SparseConfig, words: str) -> None:
    model = sparsify(tiny_llama(), config)
    folder = save_artefact(model, tmp_path / "artefact", base_model_name_or_path="me/base")
    with pytest.raises(ValueError, match=words):
        export_duo_attention(folder, tmp_path / "pattern")
    assert not (tmp_path / "pattern").exists()
