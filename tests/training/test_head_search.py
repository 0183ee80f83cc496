"""The search over sets of full heads finds those that must be full, and counts the sets it judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import comb
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_training.study.head_search import HeadSearch, search_figures
from sparse_hf_training.study.planted import planted_filler, planted_llama
from sparse_hf_training.tasks import CopySpanTask, task_label

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
COPY = CopySpanTask(num_tokens=8, cue_tokens=2)
HEADS = SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16), head_masks="all_full")


@pytest.fixture
def planted() -> tuple[HeadSearch, list[tuple[int, int]]]:
    found = planted_llama(1, num_layers=3, num_kv_heads=2)
    tokenizer: Any = None  # planted tasks are of tokens
    search = HeadSearch(
        model=sparsify(found.model, HEADS),
        tokenizer=tokenizer,
        tasks=[COPY],
        filler=planted_filler(1),
        seq_len=192,
        batch_size=4,
    )
    return search, [(layer, head) for layer, head in found.head_masks.nonzero().tolist()]


def test_planted_heads_are_the_best_set(planted: tuple[HeadSearch, list[tuple[int, int]]]) -> None:
    search, heads = planted
    sets = search.sets(2)
    assert len(sets) == len(set(sets)) == comb(6, 2)
    seen: list[float] = []
    best, first, reference = search.best(sets, screen=4, final=6, finalists=2, progress=lambda j: seen.append(j.change))
    assert sorted(best.full) == sorted(first.full) == heads
    assert best.shares == reference == {task_label(COPY): 1.0} and best.change == 0
    assert len(seen) == len(sets) and seen == sorted(seen) and seen[-1] == 0
    other = search.judge(tuple(head for head in [(1, 0), (1, 1), (2, 0)] if head not in heads), reference, 4, 0)
    assert other.change < -0.5
    figures = search_figures(best, first, reference, num_heads=6, num_sets=15, screen=4, final=6)
    where = ", ".join(f"{layer}.{head}" for layer, head in heads)
    start = f"recall {task_label(COPY)}, 66.7% of KV heads sparse, best of 15 sets of full heads"
    assert [figure.case for figure in figures] == [f"{start}, 6 samples ({where})", f"{start}, 4 samples that chose it"]


def test_given_heads_are_in_every_set(planted: tuple[HeadSearch, list[tuple[int, int]]]) -> None:
    search, _ = planted
    sets = search.sets(3, [(0, 1)])
    assert len(sets) == comb(5, 2) and all(full.count((0, 1)) == 1 for full in sets)
    with pytest.raises(ValueError, match=r"3 layers of 2 KV heads, not the heads \[\(3, 0\)\]"):
        search.sets(3, [(3, 0)])
    with pytest.raises(ValueError, match="expected 2 to 6 full heads, got 1"):
        search.sets(1, [(0, 0), (0, 1)])


def test_the_script_on_the_shipped_model(load: Load, tmp_path: Path, figure_keys: set[str]) -> None:
    every = [f"{layer}.{head}" for layer in range(4) for head in range(4)]
    line = "--num-full 15 --seq-len 256 --sinks 4 --window 24 --screen 2 --final 3 --best 1 --batch-size 3"
    line += " --tasks key_value:num_pairs=2,needle:num_needles=2 --always " + ",".join(every[2:])
    script, file = load("head_search"), tmp_path / "found.json"
    script.main([*line.split(), "--output", str(file)])
    rows = json.loads(file.read_text())
    assert all(set(row) == figure_keys for row in rows) and str(tmp_path) not in file.read_text()
    assert [row["case"].split(",")[0] for row in rows] == ["recall key_value(num_pairs=2)"] * 2 + [
        "recall needle(num_needles=2)"
    ] * 2 + ["worst task"]
    assert "6.2% of KV heads sparse, best of 2 sets" in rows[0]["case"]
    assert script.parse(["--output", "x"]).always == [(3, 1), (3, 3)]
    assert script.parse(["--output", "x", "--model", "other"]).always == []
    assert torch.tensor([row["value"] for row in rows]).isfinite().all()
