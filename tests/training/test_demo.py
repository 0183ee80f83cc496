"""The demo itself, shortened: every part runs on the shipped model, and its report says what happened."""

import json
from pathlib import Path

import pytest
import torch

from sparse_hf import load_artefact
from sparse_hf_training.demo import run_demo
from sparse_hf_training.demo.demo import random_head_masks
from sparse_hf_training.demo.recipe import HEAD_SPARSITY


def test_short_demo_leaves_everything_and_tells_the_truth(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    report = run_demo(output, mask_steps=4, tune_steps=2, num_samples=2, num_random=1, random_samples=1)
    for name in ("head_masks.png", "training_masks.png", "training_weights.png", "recall.png", "artefact/README.md"):
        assert (output / name).stat().st_size > 1000, name
    # 10 of 16 KV heads hold 16 sinks + 127 tokens instead of 2048.
    assert report.dense_kv_bytes == 2048 * 16 * 2 * 64 * 4
    assert report.kv_bytes == (6 * 2048 + 10 * (16 + 127)) * 2 * 64 * 4
    assert int((report.head_masks == 0).sum()) == 10
    assert torch.equal(load_artefact(output / "artefact").head_masks, report.head_masks)
    assert (output / "artefact" / "model.safetensors").is_file()
    assert not (output / "masks" / "artefact" / "model.safetensors").exists()
    assert report.reloaded["prompt_tokens"] > 2000 and report.reloaded["kv_bytes"] < report.kv_bytes
    right = report.reloaded["generated"] == report.reloaded["expected"]
    within = report.worst_recall_loss <= 0.05 and report.text_loss_increase <= 0.01
    assert report.reached == (right and within)
    assert json.loads((output / "demo.json").read_text())["kv_bytes"] == report.kv_bytes
    with pytest.raises(ValueError, match="no earlier demo"):
        run_demo(tmp_path)


def test_random_heads_have_the_sparsity_and_differ() -> None:
    one, two = (random_head_masks((4, 4), HEAD_SPARSITY, seed) for seed in (0, 1))
    assert int((one == 0).sum()) == int((two == 0).sum()) == 10
    assert not torch.equal(one, two)
