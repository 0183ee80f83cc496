"""The artefact on disk: round trips, refusals, and what a failing disk leaves behind."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparse_hf.artefact as artefact_module
from sparse_hf import (
    AutoSparseModelForCausalLM,
    LayerRule,
    SparseConfig,
    Streaming,
    is_sparsified,
    load_artefact,
    save_artefact,
    sparsify,
    unsparsify,
)
from sparse_hf.artefact import CONFIG_FILE, PROBE_SIZE, replace_folder, weight_probe
from sparse_hf.config import HEAD_MASKS_FILE

MASKS = torch.tensor([[0, 1], [1, 0]])
CONFIG = SparseConfig(
    sparse=Streaming(num_sink_tokens=4, window_size=16),
    rules=(LayerRule(layers="0", full=Streaming(num_sink_tokens=2, window_size=32)),),
    cache_policy="full",
    min_seq_len=8,
)


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    values = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(100)[None]).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def model(base: Path) -> PreTrainedModel:
    return sparsify(LlamaForCausalLM.from_pretrained(base).eval(), CONFIG, head_masks=MASKS)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    return save_artefact(model, tmp_path / "out" / "artefact", scores=torch.rand(2, 2), training={"steps": 3})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    change(document)
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def explicit(**changes: Any) -> dict[str, Any]:
    return {"method": "explicit", "block_size": 64, "row_ptr": [0, 1], "indices": [0], **changes}


def edit_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    kept = load_file(folder / HEAD_MASKS_FILE)
    save_file({**kept, **tensors}, folder / HEAD_MASKS_FILE)


def test_round_trip(model: PreTrainedModel, folder: Path, base: Path) -> None:
    loaded = load_artefact(folder)
    assert torch.equal(loaded.head_masks, MASKS)
    assert loaded.config == SparseConfig.from_dict({**CONFIG.to_dict(), "head_masks": "file"})
    assert loaded.scores is not None and loaded.scores.shape == (2, 2)
    assert loaded.training == {"steps": 3}
    assert loaded.base_model_name_or_path == str(base)
    assert loaded.folder == folder
    assert {"README.md", CONFIG_FILE, HEAD_MASKS_FILE} <= set(files(folder))
    again = sparsify(LlamaForCausalLM.from_pretrained(base).eval(), folder)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(AutoSparseModelForCausalLM.from_pretrained(folder).eval()), logits(model))


def test_it_carries_its_weights_when_they_were_trained(model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    folder = save_artefact(model, tmp_path / "trained", save_weights=True, base_model_name_or_path="nobody/nothing")
    again = AutoSparseModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(unsparsify(again)), logits(unsparsify(model)))
    assert "sparse_hf" not in (folder / "config.json").read_text()


def test_it_is_not_overwritten_unasked(model: PreTrainedModel, folder: Path) -> None:
    before = files(folder)
    with pytest.raises(ValueError, match=r"exists already.*overwrite"):
        save_artefact(model, folder)
    assert files(folder) == before
    save_artefact(model, folder, training={"steps": 4}, overwrite=True)
    assert load_artefact(folder).training == {"steps": 4}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_weights_are_never_overwritten_by_a_folder_without_any(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = save_artefact(model, tmp_path / "trained", save_weights=True)
    before = files(folder)
    with pytest.raises(ValueError, match=r"holds weights, and what would replace it has none.*choose another folder"):
        save_artefact(model, folder, overwrite=True)
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".trained")] == []
    save_artefact(model, folder, save_weights=True, training={"steps": 6}, overwrite=True)
    assert load_artefact(folder).training == {"steps": 6}
    assert torch.equal(logits(AutoSparseModelForCausalLM.from_pretrained(folder).eval()), logits(model))


def test_weights_that_sparsify_leaves_out_are_named(model: PreTrainedModel, tmp_path: Path) -> None:
    """The embedding is as it was, so that the probe finds nothing."""
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    folder = save_artefact(model, tmp_path / "trained", save_weights=True)
    with pytest.warns(UserWarning, match=r"carries weights that were trained.*AutoSparseModelForCausalLM"):
        sparsify(tiny_llama(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = sparsify(LlamaForCausalLM.from_pretrained(folder).eval(), folder)
        sparsify(tiny_llama(), folder, check_base_model=False)
    assert torch.equal(logits(own), logits(model))


def test_other_folders_are_never_overwritten(model: PreTrainedModel, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match=f"holds other files and no {CONFIG_FILE}"):
        save_artefact(model, home, overwrite=True)
    with pytest.raises(ValueError, match="exists already"):
        save_artefact(model, home / "letters.txt", overwrite=True)
    assert files(home) == {"letters.txt": b"dear"}
    (tmp_path / "empty").mkdir()
    save_artefact(model, tmp_path / "empty", overwrite=True)
    load_artefact(tmp_path / "empty")


def test_a_link_stays_a_link(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(folder)
    save_artefact(model, link, training={"steps": 5}, overwrite=True)
    assert link.is_symlink()
    assert load_artefact(folder).training == {"steps": 5}


@pytest.mark.parametrize("at", ["tensors", "config", "card", "weights", "rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_artefact(
    model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str, existing: bool
) -> None:
    target = folder if existing else folder.with_name("new")
    before = files(folder.parent)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "tensors":
        monkeypatch.setattr(artefact_module, "save_file", full)
    elif at == "config":
        monkeypatch.setattr(Path, "write_text", full)
    elif at == "card":
        monkeypatch.setattr("sparse_hf.model_card.write_model_card", full)
    elif at == "weights":
        monkeypatch.setattr(model, "save_pretrained", full)
    else:
        rename = artefact_module.os.rename
        monkeypatch.setattr(
            artefact_module.os,
            "rename",
            lambda a, b: full() if Path(b) == target and a.suffix != ".old" else rename(a, b),
        )
    with pytest.raises(OSError, match="No space left"):
        save_artefact(model, target, training={"steps": 9}, overwrite=True, save_weights=at == "weights")
    assert files(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_replace_folder_cleans_up_when_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "a", overwrite=False) as staging:
        (staging / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", [CONFIG_FILE, HEAD_MASKS_FILE])
def test_truncated_files(folder: Path, name: str, kept: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=f"{name}.*truncated"):
        load_artefact(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / HEAD_MASKS_FILE).unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_artefact(folder)
    with pytest.raises(ValueError, match="is no artefact"):
        load_artefact(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["config"].update(windov=3), "unknown keys.*windov.*known.*sparse"),
        (lambda d: d["config"]["sparse"].update(windov=3), "streaming: unknown keys.*windov"),
        (lambda d: d["config"]["rules"][0].pop("layers"), 'key "layers"'),
        (lambda d: d["config"].update(rules=3), "rules must be a list"),
        (lambda d: d["config"].update(head_masks=5), "head_masks must be rows"),
        (lambda d: d.update(color="red"), "unknown keys.*color"),
        (lambda d: d.update(format_version=99), "format_version 99.*update"),
        (lambda d: d.pop("base_model"), "lacks.*base_model"),
        (lambda d: d["base_model"].update(depth=3), "base_model is not understood"),
        (lambda d: d["base_model"].update(num_layers=3), r"\[3, 2\].*got \[2, 2\]"),
        (lambda d: d.update(native_windows=5), "native_windows must be a list of integers, got 5"),
        (lambda d: d.update(native_windows=["12", "12"]), "native_windows must be a list of integers"),
        (lambda d: d["config"].update(sparse={"method": ["streaming"]}), "unknown method.*known"),
        (lambda d: d["config"]["sparse"].update(num_sink_tokens=10**30), "num_sink_tokens must be .* 64 bits"),
        (
            lambda d: d["config"].update(sparse=explicit(row_ptr=5)),
            "explicit: row_ptr must be a list of integers, got 5",
        ),
        (lambda d: d["config"].update(sparse=explicit(row_ptr=[0, 0.5, 1])), "explicit: row_ptr must be a list"),
        (lambda d: d["config"].update(sparse=explicit(indices=[None])), "explicit: indices must be a list"),
        (lambda d: d["config"].update(sparse=explicit(block_size="64")), "explicit: block_size must be a positive"),
    ],
)
def test_a_document_that_is_not_understood(folder: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=words):
        load_artefact(folder)


def test_a_document_without_an_end(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        load_artefact(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"head_masks": torch.ones(2, 3)}, r"\[2, 2\].*got \[2, 3\]"),
        ({"head_masks": torch.tensor([[0.0, float("nan")], [1.0, 0.0]])}, "NaN"),
        ({"head_masks": torch.tensor([[0.0, 0.5], [1.0, 0.0]])}, "0.5.*round"),
        ({"scores": torch.rand(3)}, r"scores must be.*\[2, 2\], got \[3\]"),
        ({"base_model_probe": torch.ones(256, dtype=torch.int8)}, "base_model_probe must be float32, got torch.int8"),
    ],
)
def test_masks_that_do_not_fit(folder: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    edit_tensors(folder, **tensors)
    with pytest.raises(ValueError, match=words):
        load_artefact(folder)


def test_what_cannot_be_written_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scores must be"):
        save_artefact(model, tmp_path / "a", scores=torch.rand(4))
    with pytest.raises(ValueError, match="plain JSON"):
        save_artefact(model, tmp_path / "a", training={"loss": torch.ones(1)})
    with pytest.raises(ValueError, match="not sparsified"):
        save_artefact(tiny_llama(), tmp_path / "a")
    nameless = sparsify(tiny_llama(), CONFIG, head_masks=MASKS)
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        save_artefact(nameless, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_another_base_model_is_refused(folder: Path) -> None:
    smaller = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="num_layers 2 != 1"):
        sparsify(smaller, folder)
    assert not is_sparsified(smaller)
    other = tiny_llama(seed=1)
    with pytest.raises(ValueError, match=r"same shape but other weights.*check_base_model=False"):
        sparsify(other, folder)
    assert not is_sparsified(other)
    assert is_sparsified(sparsify(other, folder, check_base_model=False))
    assert is_sparsified(sparsify(tiny_llama().to(torch.bfloat16), folder))  # a cast is the same model


@pytest.mark.parametrize("vocab_size", [129, 136, 192])
def test_a_base_model_with_added_tokens_is_known(folder: Path, vocab_size: int) -> None:
    grown, other = tiny_llama(), tiny_llama(seed=1)
    for model in (grown, other):
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    assert is_sparsified(sparsify(grown, folder))
    with pytest.raises(ValueError, match="same shape but other weights"):
        sparsify(other, folder)


def test_the_probe_of_earlier_artefacts_is_known(folder: Path) -> None:
    tensors = load_file(folder / HEAD_MASKS_FILE)
    model = tiny_llama(vocab_size=120)
    probe = weight_probe(model, half=True)
    assert probe is not None and not torch.equal(probe, weight_probe(model))
    save_file({**tensors, "base_model_probe": probe}, folder / HEAD_MASKS_FILE)
    assert is_sparsified(sparsify(model, folder))
    with pytest.raises(ValueError, match="same shape but other weights"):
        sparsify(tiny_llama(seed=1, vocab_size=120), folder)


def test_the_probe_stays_inside_a_large_embedding() -> None:
    """In float32, 64128 * 4096 - 1 (half of Llama 3.1's embedding) rounds up to one past the end."""

    class Large:
        def get_input_embeddings(self) -> nn.Module:
            embedding = nn.Embedding(1, 1)
            embedding.weight = nn.Parameter(torch.zeros(1).expand(128256, 4096), requires_grad=False)
            return embedding

    probe = weight_probe(Large())
    assert probe is not None and probe.shape == (PROBE_SIZE,)
