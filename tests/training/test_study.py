"""The study: planted heads are what they claim, recipes rank, plans resume within their time, small models train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_hf_training.study.study as study_module
from sparse_hf import SparseConfig, Streaming, set_head_masks, sparsify
from sparse_hf.head_masks import round_scores
from sparse_hf.patching import get_handle
from sparse_hf.summary import sparsity_summary
from sparse_hf_training.data import Document, DocumentStore
from sparse_hf_training.evaluation import evaluate_recall
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.study import side_by_side
from sparse_hf_training.study.bench import Bench
from sparse_hf_training.study.planted import (
    average_precision,
    planted_filler,
    planted_llama,
    planted_places,
    planted_rows,
    precision_recall,
)
from sparse_hf_training.study.pretrain import SmallModelConfig, pretrain, rate, train_tokenizer
from sparse_hf_training.study.recipes import RECIPES, _Decay, _sampled_penalty, uniform_window
from sparse_hf_training.study.study import Plan, Unit
from sparse_hf_training.tasks import CopySpanTask, Filler, KeyValueTask

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
BRANCH = Streaming(num_sink_tokens=4, window_size=16)
COPY = CopySpanTask(num_tokens=8, cue_tokens=2)
SEQ_LEN = 192
SHAPE = {"num_layers": 3, "num_kv_heads": 2}


def planted_bench(seed: int = 0, max_steps: int = 2) -> Bench:
    filler = planted_filler(seed)
    return Bench(
        load=lambda: planted_llama(seed, **SHAPE).model,
        tokenizer=None,
        branch=BRANCH,
        filler=filler,
        rows=planted_rows(filler, SEQ_LEN),
        tasks=[COPY],
        seq_len=SEQ_LEN,
        max_steps=max_steps,
        seed=seed,
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_heads_are_needed_and_enough(seed: int) -> None:
    planted = planted_llama(seed, **SHAPE)
    model, filler = planted.model, planted_filler(seed + 7)
    first, second = planted_places(planted.head_masks)
    assert first[0] != second[0] and 0 not in (first[0], second[0]) and planted.local[0] == 0

    # In the middle of the text, where no window from its end reaches.
    task = CopySpanTask(num_tokens=8, cue_tokens=2, depth=0.5)

    def exact() -> float:
        (result,) = evaluate_recall(model, [task], filler, None, seq_len=SEQ_LEN, num_samples=12)  # type: ignore[arg-type]
        return result.exact_match

    assert exact() == 1.0
    sparsify(model, SparseConfig(sparse=BRANCH, head_masks="all_full"))
    assert exact() == 1.0
    set_head_masks(model, planted.head_masks)
    assert exact() == 1.0, "the planted heads alone do it"
    for layer, head in (first, second):
        without = torch.ones_like(planted.head_masks)
        without[layer, head] = 0
        set_head_masks(model, without)
        assert exact() == 0.0, "and without one of them, all others full, nothing does"


def test_planted_text_repeats_beyond_the_window() -> None:
    rows = planted_rows(planted_filler(0), SEQ_LEN, count=3)
    assert len(rows) == 3
    ids = [rows[n]["input_ids"] for n in range(3)]
    assert all(torch.equal(row[: SEQ_LEN // 2], row[SEQ_LEN // 2 :]) for row in ids) and not torch.equal(ids[0], ids[1])
    assert len(set(ids[0].tolist())) == SEQ_LEN // 2 > 4 * BRANCH.window_size


def test_precision_and_recall_by_hand() -> None:
    planted = torch.tensor([[1, 0], [0, 1]])
    assert precision_recall(torch.tensor([[1, 1], [0, 0]]), planted) == (0.5, 0.5)
    assert precision_recall(torch.tensor([[1, 0], [1, 1]]), planted) == (2 / 3, 1.0)
    assert average_precision(torch.tensor([[4.0, 3.0], [1.0, 2.0]]), planted) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.zeros(2, 2), planted) == 0.5, "equal scores say nothing"
    with pytest.raises(ValueError, match="one shape and full heads"):
        precision_recall(torch.zeros(2, 2), planted)
    with pytest.raises(ValueError, match="3 layers or more, and 2, 4 or 8 KV heads or so, got 3 and 3"):
        planted_llama(num_layers=3, num_kv_heads=3)


def test_ablation_finds_the_planted_heads_and_leaves_the_model_full() -> None:
    bench = planted_bench()
    model, truth = bench.model(), planted_llama(0, **SHAPE).head_masks
    scores = RECIPES["ablation"].rank(bench, model, 2 / 3).scores
    assert precision_recall(round_scores(scores, 2 / 3), truth) == (1.0, 1.0)
    assert average_precision(scores, truth) == 1.0 and bool(get_handle(model).head_masks.all())


def test_training_free_scores_are_those_of_the_calibrator() -> None:
    bench = planted_bench()
    model = bench.model()
    scores = RECIPES["training_free"].rank(bench, model, 0.5).scores
    assert scores.shape == (3, 2) and 0 < scores.max() <= 1 and bool(get_handle(model).head_masks.all())


def test_random_heads_and_uniform_layers() -> None:
    bench = planted_bench()
    model = bench.model()
    one, two = (RECIPES["random"].rank(bench.with_seed(seed), model, 0.5).scores for seed in (0, 1))
    assert not torch.equal(one, two) and RECIPES["random"].draws == 5
    half = RECIPES["uniform_layers"].masks(bench, model, 0.5)
    assert half.sum(1).tolist() == [2, 0, 1]
    most = RECIPES["uniform_layers"].masks(bench, model, 2 / 3)
    assert most.sum(1).tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("name", "steps"),
    # Hard-concrete gates are 1, and without a gradient, in most of the first draws; PruLong's rates move faster.
    [
        ("gates", 24),
        ("elimination", 1),
        ("attribution", 1),
        ("prulong_published", 6),
        ("prulong_mended", 6),
        ("duo_attention", 4),
    ],
)
def test_recipes_that_learn_tell_heads_apart_and_leave_the_model_as_it_was(name: str, steps: int) -> None:
    bench = planted_bench(max_steps=steps)
    model = bench.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = RECIPES[name].rank(bench, model, 0.5).scores
    assert scores.shape == (3, 2) and scores.std() > 0, "heads are not told apart"
    assert torch.equal(scores, RECIPES[name].rank(bench, model, 0.5).scores), "the seed decides"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert bool(get_handle(model).head_masks.all())


def test_prulong_as_published_decays_and_penalises_samples() -> None:
    model = planted_bench().model()
    learning = attach_mask_learning(model, MaskLearningConfig(mask_learning_rate=1.0, clamp_log_alpha=None))
    learning.begin_step(0, 10)
    with pytest.raises(RuntimeError, match="needs a draw"):
        _sampled_penalty(learning)
    learning.draw()
    z = torch.stack([learning.layer_gate(layer) for layer in range(3)])  # type: ignore[misc]
    gap = (1 - z).mean() - learning.targets()[0]
    with torch.no_grad():
        learning.regularizer.linear.fill_(2.0)  # type: ignore[operator, union-attr]
    assert _sampled_penalty(learning).item() == pytest.approx(2 * gap.item(), rel=1e-5)
    assert learning.penalty().item() != pytest.approx(2 * gap.item(), rel=1e-3)
    first = learning.gates.values.detach().clone()

    class State:
        global_step, max_steps = 1, 10

    _Decay(learning).on_step_end(None, State, None)
    assert torch.allclose(learning.gates.values.detach(), 0.9 * first)


def test_a_uniform_window_holds_as_many_bytes(model_folder: Path) -> None:
    def held(config: SparseConfig, masks: Any = None) -> int:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        return sparsity_summary(sparsify(model, config, head_masks=masks), 1000).kv_bytes

    masks = torch.tensor([[1, 0], [0, 0]])
    wide = uniform_window(BRANCH, 0.75, 1000)
    assert held(SparseConfig(sparse=wide)) == pytest.approx(held(SparseConfig(sparse=BRANCH), masks), rel=0.01)
    assert wide.num_sink_tokens == 4


def test_plans() -> None:
    plan = Plan(recipes=("gates", "random", "uniform_window"), sparsities=(0.5, 0.75), num_seeds=3)
    units = list(plan.units())
    assert len(units) == 2 * 2 * (3 + 5 + 1) == len(set(units)) == len({unit.variant for unit in units})
    assert [unit.stage for unit in units] == ["masks"] * 18 + ["masks_and_weights"] * 18
    own = Plan(recipes=("random", "gates"), sparsities=(0.75, 0.5), num_seeds=1, stages=("masks",)).units()
    order = [(unit.head_sparsity, unit.recipe) for unit in own if unit.seed == 0]
    assert order == [(share, name) for share in (0.75, 0.5) for name in ("random", "gates")], "orders are the caller's"
    for bad, message in (
        ({"recipes": ("best",)}, "unknown recipes best; known: gates"),
        ({"stages": ("all",)}, "unknown stages all"),
        ({"sparsities": (1.0,)}, "must lie in"),
        ({"num_seeds": 0}, "1 seed or more"),
        ({"recipes": ("random", "gates", "random")}, "recipes must all be different, got"),
        ({"sparsities": (0.5, 0.5)}, "sparsities must all be different, got"),
        ({"tune_recall_share": 1.0}, r"tune_recall_share must lie in \(0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan(**bad)  # type: ignore[arg-type]


def test_the_study_on_the_shipped_model_stops_in_time_and_goes_on(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure_keys: set[str]
) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    line = "--recipes gates,uniform_layers,uniform_window --sparsities 50 --seeds 1 --sinks 4 --window 24 --steps 3 "
    line += "--seq-len 384 --train-seq-len 256 --train-tasks key_value:num_pairs=2 --samples 2 --rows 1 "
    line += "--tune-tasks key_value:num_pairs=2,niah_multikey_2 "
    line += f"--tasks key_value:num_pairs=4 --cells {tmp_path / 'cells'} --out {tmp_path / 'out'}"
    script, file = load("quality_study"), tmp_path / "out" / "quality_study.json"
    script.main([*line.split(), "--budget-minutes", "0"])
    cells = sorted(path.name.split("--")[0] for path in (tmp_path / "cells" / "cells").iterdir())
    assert cells == ["dense"] * 3 and not file.exists(), "dense is measured, and nothing begun after the time"
    asked: list[Unit] = []
    original = study_module.Study.measure

    def watched(self: Any, unit: Unit, progress: Any) -> Any:
        asked.append(unit)
        return original(self, unit, progress)

    monkeypatch.setattr(study_module.Study, "measure", watched)
    script.main(line.split())
    assert len(asked) == 6
    rows = json.loads(file.read_text())
    assert all(set(row) == figure_keys for row in rows)
    plots = sorted(path.name for path in file.parent.glob("*.png"))
    assert plots == ["quality_study_masks.png", "quality_study_masks_and_weights.png"]
    assert str(tmp_path) not in file.read_text() and rows[0]["command"].startswith("python scripts/quality_study.py")
    values = {row["case"]: row["value"] for row in rows}
    held = [values[f"masks only, 50% sparse, {name}: KV bytes, of dense"] for name in ("gates", "uniform_window")]
    assert held[0] == values["masks only, 50% sparse, uniform_layers: KV bytes, of dense"]
    assert held[1] == pytest.approx(held[0], rel=0.01) and held[0] < 60
    read = "masks and weights, 50% sparse, {}: tokens read to find them"
    assert [values.get(read.format(name)) for name in ("gates", "uniform_layers", "uniform_window")] == [
        pytest.approx(3 * 256 / 1e6),
        0.0,
        None,
    ]
    tuned = "masks and weights, 50% sparse, uniform_layers: loss, increase"
    assert values[tuned] != values[tuned.replace("masks and weights", "masks only")]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("everything is measured already")

    monkeypatch.setattr(Bench, "train", refuse)
    script.main(line.split())
    assert {row["case"]: row["value"] for row in json.loads(file.read_text())} == values
    script.main([*line.split(), "--sparsities", "25,50", "--budget-minutes", "0"])
    again = {row["case"]: row["value"] for row in json.loads(file.read_text())}
    assert again == values, "what was measured is written, whatever is still to come"
    text = load("make_tables").render(
        "<!-- grid: quality_study / masks only, 50% sparse -->\n<!-- end -->", tmp_path / "out"
    )
    assert "| gates | " in text and "| uniform_window | " in text and "worst task, change" in text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_forward_pass_answers_as_generate_does(load: Load, tmp_path: Path, batch_size: int) -> None:
    line = "--sinks 4 --window 64 --seq-len 640 --train-seq-len 640 --samples 5 --rows 1 --answers generate "
    line += f"--batch-size {batch_size} --tasks needle:num_needles=4,chain,two_turns:num_needles=4 --out {tmp_path}"
    script = load("quality_study")
    _, bench, lab = script.prepare(script.parse(line.split()))
    for branch, answers in (("streaming", "forward"), ("triangle", "generate")):
        by_default = line.replace("--answers generate", f"--branch {branch}")
        assert script.prepare(script.parse(by_default.split()))[2].answers == answers
    model = bench.model().eval()
    masks = torch.zeros(4, 4)
    masks[2:] = 1
    set_head_masks(model, masks)
    written = lab.measure(model, "sparse", CellStore(tmp_path / "written", lab.settings(model)))
    quick = replace(lab, answers="forward", num_checked=3)
    found = quick.measure(model, "sparse", CellStore(tmp_path / "quick", quick.settings(model)))
    assert [task.exact for task in found.tasks] == [task.exact for task in written.tasks]
    assert 0 < sum(task.num_exact for task in found.tasks) < 15, "outcomes differ, or the comparison says little"
    assert [(task.num_checked, task.num_differing) for task in found.tasks] == [(3, 0)] * 3
    assert [(task.num_checked, task.num_differing) for task in written.tasks] == [(0, 0)] * 3


def test_processes_side_by_side_find_what_one_finds(load: Load, tmp_path: Path) -> None:
    line = "--recipes ablation,uniform_layers --sparsities 50,75 --seeds 1 --stages masks --sinks 4 --window 24 "
    line += "--seq-len 384 --train-seq-len 256 --train-tasks key_value:num_pairs=2 --samples 2 --rows 1 "
    line += "--tasks key_value:num_pairs=4"

    def places(name: str) -> list[str]:
        return [*line.split(), "--cells", str(tmp_path / name / "cells"), "--out", str(tmp_path / name)]

    def values(name: str) -> dict[str, float]:
        rows = json.loads((tmp_path / name / "quality_study.json").read_text())
        return {row["case"]: row["value"] for row in rows if row["unit"] != "s"}

    load("quality_study").main(places("one"))
    # New processes import the main module, so that it has to be the script.
    subprocess.run([sys.executable, "scripts/quality_study.py", *places("two"), "--jobs", "2"], cwd=ROOT, check=True)
    one, two = values("one"), values("two")
    assert list(one) == list(two) and one == two
    scores = sorted(path.name for path in (tmp_path / "two" / "cells" / "cells").glob("scores--*"))
    assert len(scores) == 2, "both rank once for both sparsities"


def test_no_two_processes_do_the_same() -> None:
    units = list(
        Plan(recipes=("gates", "ablation", "uniform_window"), sparsities=(0.5, 0.75), stages=("masks",)).units()
    )
    known: set[str] = set()

    class Idle:
        def submit(self, call: Any, unit: Unit) -> Any:
            return Future()

    class Known:
        def has_scores(self, unit: Unit) -> bool:
            return unit.recipe == "uniform_window" or unit.scores in known

        def is_measured(self, unit: Unit) -> bool:
            return unit.recipe == "ablation" and unit.seed == 2

        def cells(self, unit: Unit) -> str:
            return f"{unit.head_sparsity}, {'window' if unit.recipe == 'uniform_window' else 'equal masks'}"

    waiting, running = list(units), dict[Any, Any]()
    call = (Known(), [Idle() for _ in units], waiting, running, None, lambda unit, what: None)
    side_by_side._submit(*call)  # type: ignore[arg-type]
    assert {unit.variant for unit in waiting} == {f"ablation, 75% sparse, seed {n}, masks" for n in range(3)}
    known.add("ablation, seed 1")
    side_by_side._submit(*call)  # type: ignore[arg-type]
    assert [unit.seed for unit in waiting] == [0, 2]
    # Its other sparsity has its heads; they are those of seed 1, which are being measured.
    known.add("ablation, seed 2")
    side_by_side._submit(*call)  # type: ignore[arg-type]
    assert [unit.seed for unit in waiting] == [0, 2]
    late = (*call[:4], 0.0, call[5])
    known.update({"ablation, seed 0"})
    running.clear()
    side_by_side._submit(*late)  # type: ignore[arg-type]
    assert [unit.seed for unit in waiting] == [0], "after the deadline come only units that are measured already"


def test_processes_are_born_with_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later is too late: what they import looks for GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    workers = [side_by_side.Worker(place, int) for place in ("3", "5")]
    try:
        # Nothing sets it in the process itself.
        seen = [worker.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() for worker in workers]  # type: ignore[arg-type]
        assert seen == ["3", "5"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    finally:
        for worker in workers:
            worker.pool.shutdown()


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or side_by_side.devices(2) == [None, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert side_by_side.devices(3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert side_by_side.devices(3) == ["3", "GPU-5", "3"]


def test_the_planted_script(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    script = load("planted_heads")
    script.main(
        ["--seeds", "2", "--recipes", "ablation,random", "--layers", "3", "--kv-heads", "2", "--out", str(tmp_path)]
    )
    rows = {row["case"]: row["value"] for row in json.loads((tmp_path / "planted_heads.json").read_text())}
    assert rows["planted heads, ablation: recall, 2 models"] == 1.0
    assert rows["planted heads, random: average precision, 2 models"] <= 1.0 and len(rows) == 6
    with pytest.raises(ValueError, match="unknown recipes best"):
        script.main(["--recipes", "best", "--out", str(tmp_path)])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_small_model_learns_from_nothing(family: Any, story: str) -> None:
    tokenizer = train_tokenizer([story], 300)
    assert tokenizer.decode(tokenizer("Ünïcode 12")["input_ids"]) == "Ünïcode 12"
    assert len(tokenizer("123", add_special_tokens=False)["input_ids"]) == 3
    ids = tokenizer(story)["input_ids"]
    documents = DocumentStore.from_documents([Document(input_ids=ids, labels=ids)])
    config = SmallModelConfig(
        family=family,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        seq_len=256,
        steps=24,
        batch_size=2,
        learning_rate=1e-2,
    )
    assert config.phases == ((0, 14, 32), (14, 10, 256))
    seen: list[tuple[int, float, float]] = []
    model = pretrain(
        config,
        documents,
        tokenizer,
        Filler.from_texts([story], tokenizer),
        [KeyValueTask(num_pairs=2)],
        torch.device("cpu"),
        progress=lambda step, text, recall, seconds: seen.append((step, text, recall)),
    )
    assert [step for step, _, _ in seen] == list(range(1, 25)) and not model.training
    assert 5.4 < seen[0][1] < 6.2 and seen[-1][1] < seen[0][1] - 1
    recalls = [recall for _, _, recall in seen if recall == recall]
    assert recalls and all(step > 14 for step, _, recall in seen if recall == recall), "short rows have no room for it"
    assert model.config.model_type == family
    assert rate(0, 1000) == 0.1 and rate(9, 1000) == 1.0 and rate(999, 1000) == pytest.approx(0.1, abs=1e-3)


def test_the_script_leaves_a_model_that_loads(
    load: Load, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    line = f"--data {text_file} --held {text_file} --out {out} --vocab-size 300 --hidden-size 32 --num-layers 2 "
    line += "--intermediate-size 64 --num-heads 4 --num-kv-heads 2 --head-dim 8 --seq-len 160 --steps 4 --batch-size 2 "
    line += "--tasks key_value:num_pairs=1 --judged key_value:num_pairs=1 --samples 2"
    script = load("train_small_model")
    script.main(line.split())
    report = json.loads(capsys.readouterr().out)
    assert set(report["recall"]) == {"key_value(num_pairs=1)"} and report["tokens"] == 4 * 2 * 160
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["parameters"] and len(tokenizer) == 300
    with pytest.raises(ValueError, match="not empty; choose another --out"):
        script.main(line.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "gpt"}, "family must be one of"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"steps": 0}, "steps must be positive"),
        ({"recall_ratio": 1.0}, "recall_ratio must lie in"),
    ],
)
def test_small_models_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallModelConfig(**change)
