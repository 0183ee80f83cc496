"""What a study does once, equal masks measured and heads ranked for all units that need them, and what ranking cost."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparse_hf_training.elimination as elimination_module
import sparse_hf_training.evaluation.lab as lab_module
from sparse_hf import Streaming
from sparse_hf.figures import replace_json
from sparse_hf.patching import get_handle
from sparse_hf_training.data import PackedTextDataset, pack_documents, text_document
from sparse_hf_training.evaluation.footprint import Footprint
from sparse_hf_training.evaluation.lab import Lab
from sparse_hf_training.evaluation.losses import TextLoss
from sparse_hf_training.evaluation.statistics import (
    bootstrap_interval,
    design_effect,
    paired_difference_interval,
    wilson_interval,
)
from sparse_hf_training.evaluation.variant import TaskOutcome, VariantResult
from sparse_hf_training.study.bench import Bench
from sparse_hf_training.study.figures import study_figures
from sparse_hf_training.study.ranking import Ranking
from sparse_hf_training.study.recipes import RECIPES
from sparse_hf_training.study.study import Plan, Study, Unit, masks_variant
from sparse_hf_training.tasks import Filler, KeyValueTask, MultiKeyNeedleTask

SEQ_LEN = 256
TASK = KeyValueTask(num_pairs=2)


@pytest.fixture
def bench(model_folder: Path, story: str, tokenizer: PreTrainedTokenizerFast, filler: Filler) -> Bench:
    """Of a tiny random model with 2 layers of 2 KV heads."""
    return Bench(
        load=lambda: AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        tokenizer=tokenizer,
        branch=Streaming(num_sink_tokens=2, window_size=8),
        filler=filler,
        rows=PackedTextDataset(pack_documents([text_document(story, tokenizer)], SEQ_LEN)[0]),
        tasks=[TASK],
        seq_len=SEQ_LEN,
        max_steps=2,
    )


@pytest.fixture
def lab(bench: Bench) -> Lab:
    assert bench.tokenizer is not None
    return Lab(
        tokenizer=bench.tokenizer,
        tasks=[TASK],
        filler=bench.filler,
        rows=bench.rows,
        seq_len=SEQ_LEN,
        num_samples=2,
        num_rows=1,
        num_decoded=2,
        answers="forward",
        num_checked=1,
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model of each time that text is measured, once a variant."""
    models: list[Any] = []
    original = lab_module.text_loss

    def watched(model: Any, *more: Any) -> Any:
        models.append(model)
        return original(model, *more)

    monkeypatch.setattr(lab_module, "text_loss", watched)
    return models


def give_scores(monkeypatch: pytest.MonkeyPatch, **scores: list[list[float]]) -> None:
    """Lets recipes find these scores."""
    for name, values in scores.items():
        found = Ranking(scores=torch.tensor(values), tokens=0)
        monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], rank=lambda *_, found=found: found))


def unit(recipe: str, head_sparsity: float = 0.5, stage: str = "masks") -> Unit:
    return Unit(recipe=recipe, head_sparsity=head_sparsity, seed=0, stage=stage)


def test_equal_masks_are_measured_once(
    bench: Bench, lab: Lab, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both keep the last layer; at 75% each keeps another one of its heads.
    give_scores(monkeypatch, ablation=[[0.0, 1.0], [2.0, 3.0]], random=[[1.0, 0.0], [9.0, 8.0]])
    plan = Plan(recipes=("ablation", "random", "uniform_window"), sparsities=(0.5, 0.75), stages=("masks",))
    study = Study(bench, lab, plan, tmp_path)
    one, other = study.measure(unit("ablation")), study.measure(unit("random"))
    assert len(measured) == 1 and one.name == unit("ablation").variant and other.name == unit("random").variant
    assert replace(other, name=one.name) == one
    (path,) = {path.name.split("--")[0] for path in (tmp_path / "cells").glob("*text*")}
    assert path == "full-heads-1.0-1.1"
    differing = [study.measure(unit(name, 0.75)) for name in ("ablation", "random")]
    assert len(measured) == 3 and differing[0].text != differing[1].text
    assert differing[0].footprint.held == differing[1].footprint.held < one.footprint.held
    # A window on all heads, and weights that are tuned, are none of a ranking's masks alone. From the same seed weights
    # are tuned on the same rows.
    window = study.measure(unit("uniform_window"))
    tuned = [study.measure(unit(name, stage="masks_and_weights")) for name in ("ablation", "random")]
    assert len(measured) == 5 and window.text != one.text != tuned[0].text
    assert replace(tuned[1], name=tuned[0].name) == tuned[0]
    other_seed = study.measure(replace(unit("ablation", stage="masks_and_weights"), seed=1))
    assert len(measured) == 6 and other_seed.text != tuned[0].text
    again = Study(bench, lab, plan, tmp_path)
    assert [again.measure(unit(name)) for name in ("ablation", "random", "uniform_window")] == [one, other, window]
    assert [again.measure(unit(name, stage="masks_and_weights")) for name in ("ablation", "random")] == tuned
    assert len(measured) == 6, "a study that goes on finds all of it"


def test_a_study_that_stops_amid_masks_goes_on(
    bench: Bench, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_scores(monkeypatch, ablation=[[0.0, 1.0], [2.0, 3.0]])
    whole = Study(bench, lab, Plan(), tmp_path / "whole").measure(unit("ablation"))
    study = Study(bench, lab, Plan(), tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(lab_module, "measure_footprint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.measure(unit("ablation"))
    assert len(list((tmp_path / "cut" / "cells").glob("full-heads*"))) == 2
    found = study.measure(unit("ablation"))
    assert (found.text, found.footprint.kv_bytes) == (whole.text, whole.footprint.kv_bytes)


def test_names_of_masks() -> None:
    masks = torch.zeros(40, 8, dtype=torch.long)
    assert masks_variant(masks) == "full heads none"
    masks[3, 1] = masks[12, 7] = 1
    assert masks_variant(masks) == "full heads 3.1 12.7"
    masks[20:30] = 1
    long = masks_variant(masks)
    assert long.startswith("full heads 82 of digest ") and len(long) < 60
    masks[20, 0], masks[30, 0] = 0, 1
    assert masks_variant(masks).startswith("full heads 82 of digest ") and masks_variant(masks) != long


def test_two_processes_may_write_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename, other = tmp_path / "cell.json", os.replace, os.getpid() + 1

    def overtaken(source: Path, target: Path) -> None:
        """Another process writes the same file, from beginning to end, before this one renames its own."""
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", rename)
            patch.setattr(os, "getpid", lambda: other)
            replace_json(path, {"by": "the other"})
        assert json.loads(path.read_text()) == {"by": "the other"}
        rename(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    replace_json(path, {"by": "this one"})
    assert json.loads(path.read_text()) == {"by": "this one"}
    assert [file.name for file in tmp_path.iterdir()] == ["cell.json"]


def test_elimination_ranks_once_a_seed_and_keeps_to_the_rows_of_others(
    bench: Bench, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(bench, max_steps=21, batch_size=2)
    passed: list[Tensor] = []
    original = elimination_module.row_losses

    def watched(model: Any, head: Any, rows: Any, batch_size: int) -> Any:
        passed.extend(row["input_ids"] for row in rows)
        return original(model, head, rows, batch_size)

    monkeypatch.setattr(elimination_module, "row_losses", watched)
    study = Study(bench, lab, Plan(), tmp_path)
    masks = [study.masks(unit("elimination", share)) for share in (0.25, 0.5, 0.75)]
    assert [int(each.sum()) for each in masks] == [3, 2, 1]
    assert bool((masks[0] >= masks[1]).all()) and bool((masks[1] >= masks[2]).all())
    # Of each kind, task and text, four masks read 2 rows each, three 2 and two 3; one more of the last would be 44.
    assert len(passed) == 2 * (4 * 2 + 3 * 2 + 2 * 3) == 40 and {row.numel() for row in passed} == {SEQ_LEN}
    study.masks(replace(unit("elimination"), seed=1))
    assert len(passed) == 2 * 40


@pytest.mark.parametrize(
    "name", ["elimination", "attribution", "ablation", "training_free", "random", "uniform_layers"]
)
def test_rankings_tell_the_tokens_that_passed_the_model(bench: Bench, name: str) -> None:
    counted: list[int] = []

    def load() -> Any:
        model = bench.load()
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counted.append(ids[0].numel()))
        return model

    watched = replace(bench, load=load)
    assert RECIPES[name].rank(watched, watched.model(), 0.5).tokens == sum(counted)
    assert bool(counted) == (name not in ("random", "uniform_layers"))


def test_the_store_keeps_what_a_ranking_cost(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    study = Study(bench, lab, Plan(), tmp_path)
    first = study.ranking(unit("prulong_mended"))
    assert first is not None and first.tokens == 2 * SEQ_LEN and first.seconds > 0
    again = study.ranking(unit("prulong_mended", stage="masks_and_weights"))
    assert again is not None and again.to_dict() == first.to_dict()
    assert study.ranking(unit("uniform_window")) is None
    with pytest.raises(ValueError, match="uniform_window chooses no heads; ask for masks of"):
        study.masks(unit("uniform_window"))


def result_of(**exact: tuple[bool, ...]) -> VariantResult:
    """Of these tasks' outcomes, all else alike."""
    return VariantResult(
        name="any",
        tasks=tuple(
            TaskOutcome(task=name, exact=each, depths=(), answer_losses=(), seconds=1.0) for name, each in exact.items()
        ),
        text=TextLoss(rows=(2.0,), edges=(0, 1), bins=(2.0,)),
        footprint=Footprint(tokens=(1,), kv_bytes=(8,), prefill_density=1.0, decode_density=1.0),
    )


def test_intervals_are_over_the_samples_that_all_seeds_answer() -> None:
    yes, no = True, False
    dense = result_of(easy=(yes,) * 4, hard=(yes, yes, yes, no), failed=(no, no, no, yes))
    seeds = [
        result_of(easy=(yes, yes, yes, no), hard=hard, failed=(yes,) * 4)
        for hard in ((yes, no, no, no), (yes, yes, no, no), (no, no, no, yes))
    ]

    def figures(results: list[VariantResult]) -> dict[str, float]:
        units = {replace(unit("random"), seed=seed): result for seed, result in enumerate(results)}
        rows = study_figures(dense, units, dict.fromkeys(units))
        return {row.case.removeprefix("masks only, 50% sparse, random: "): row.value for row in rows}

    def ends(found: dict[str, float], column: str) -> tuple[float, float]:
        return found[f"{column} (95% low)"], found[f"{column} (95% high)"]

    found, runs = figures(seeds), [result.tasks[0].exact + result.tasks[1].exact for result in seeds]
    effect = design_effect(runs)
    assert 1 < effect < 3 and found["recall"] == 13 / 24 and found["recall hard"] == 4 / 12
    assert ends(found, "recall") == wilson_interval(13 / effect, 24 / effect)
    assert found["worst task, change"] == 4 / 12 - 3 / 4
    hard = [right for result in seeds for right in result.tasks[1].exact]
    low, high = paired_difference_interval(hard, [yes, yes, yes, no] * 3, num_runs=3)
    assert ends(found, "worst task, change") == (low, high)
    pooled = paired_difference_interval(hard, [yes, yes, yes, no] * 3)
    assert low < pooled[0] and high > pooled[1]
    # Seeds that found the same heads say what one says.
    one, same = figures(seeds[:1]), figures(seeds[:1] * 3)
    assert one.pop("seeds") == 1 and same.pop("seeds") == 3 and one == same


def test_recipes_are_compared_with_the_recommended_one_sample_by_sample() -> None:
    yes, no = True, False
    dense = result_of(easy=(yes,) * 4, hard=(yes,) * 4)
    ours = [result_of(easy=(yes,) * 4, hard=(yes, yes, no, no)), result_of(easy=(yes,) * 4, hard=(yes, yes, yes, no))]
    theirs = result_of(easy=(yes, yes, yes, no), hard=(yes, no, no, no))
    units = {replace(unit("elimination"), seed=seed): result for seed, result in enumerate(ours)}
    units[unit("random")] = theirs
    rows = study_figures(dense, units, dict.fromkeys(units))
    found = {row.case.removeprefix("masks only, 50% sparse, random: "): row.value for row in rows}
    assert found["recall, minus elimination"] == pytest.approx((0 + 0 + 0 - 1 + 0 - 1 - 0.5 + 0) / 8)
    assert found["worst task, minus elimination"] == pytest.approx((0 - 1 - 0.5 + 0) / 4), "of the hard task"
    ends = [found[f"worst task, minus elimination (95% {end})"] for end in ("low", "high")]
    assert ends == list(bootstrap_interval([0.0, -1.0, -0.5, 0.0])) and ends[0] < -0.375 < ends[1]
    assert not any("elimination: " in row.case and "minus" in row.case for row in rows), "not with itself"
    alone = study_figures(dense, {unit("random"): theirs}, {unit("random"): None})
    assert not any("minus" in row.case for row in alone)


def test_figures_hold_the_mean_cost_of_the_seeds() -> None:
    result = result_of(own=(True, True))
    units = [replace(unit("random"), seed=seed) for seed in range(2)] + [unit("uniform_window")]
    costs = {each: Ranking(scores=torch.ones(1, 1), tokens=10**6 * (1 + each.seed), seconds=3.0) for each in units[:2]}
    rows = study_figures(result, dict.fromkeys(units, result), {**costs, units[2]: None})
    found = {row.case: row for row in rows}
    seconds, tokens = (
        found[f"masks only, 50% sparse, random: {name}"] for name in ("heads found in", "tokens read to find them")
    )
    assert (seconds.value, seconds.unit, seconds.lower_is_better) == (3.0, "s", True)
    assert (tokens.value, tokens.unit, tokens.lower_is_better) == (1.5, "million tokens", True)
    both = ("heads found in", "tokens read to find them")
    assert {case.partition(": ")[0] for case in found if case.endswith(both)} == {"masks only, 50% sparse, random"}


def test_weights_are_tuned_on_tasks_of_their_own(
    bench: Bench, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_scores(monkeypatch, ablation=[[0.0, 1.0], [2.0, 3.0]])
    read: list[list[int]] = []
    original = Bench.train

    def watched(self: Bench, model: Any, stage: Any, rows: Any, *more: Any, **others: Any) -> Any:
        read.extend(row["input_ids"].tolist() for row in rows)
        return original(self, model, stage, rows, *more, **others)

    monkeypatch.setattr(Bench, "train", watched)
    tuning = replace(bench, tasks=[MultiKeyNeedleTask()], max_steps=8)
    plan = Plan(tune_recall_share=0.25)
    Study(bench, lab, plan, tmp_path, tuning=tuning).measure(unit("ablation", stage="masks_and_weights"))
    assert bench.tokenizer is not None
    texts = [bench.tokenizer.decode(row) for row in read]
    needles = [text for text in texts if "number" in text]
    assert len(texts) == 8 and 0 < len(needles) < 5
    # The rankings stay, and weights that were tuned otherwise are others.
    for other in ({"plan": Plan(), "tuning": tuning}, {"plan": plan, "tuning": replace(tuning, tasks=[TASK])}):
        read.clear()
        for _ in range(2):
            Study(bench, lab, folder=tmp_path, **other).measure(unit("ablation", stage="masks_and_weights"))  # type: ignore[arg-type]
        assert len(read) == 8


def test_heads_are_ranked_under_a_window_of_their_own(
    bench: Bench, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured and tuned has the window of `tuning`, whatever heads were ranked with."""
    windows: dict[str, list[int]] = {"ranked": [], "tuned": [], "measured": []}

    def window(model: Any) -> int:
        branch = get_handle(model).config.sparse
        assert isinstance(branch, Streaming)
        return branch.window_size

    def ranked(bench: Bench, model: Any, head_sparsity: float) -> Ranking:
        windows["ranked"].append(window(model))
        return Ranking(scores=torch.tensor([[0.0, 1.0], [2.0, 3.0]]), tokens=0)

    monkeypatch.setitem(RECIPES, "ablation", replace(RECIPES["ablation"], rank=ranked))
    for target, name, key in ((Bench, "train", "tuned"), (Lab, "measure", "measured")):
        original = getattr(target, name)

        def watched(self: Any, model: Any, *more: Any, key: str = key, original: Any = original, **others: Any) -> Any:
            windows[key].append(window(model))
            return original(self, model, *more, **others)

        monkeypatch.setattr(target, name, watched)
    tuning = replace(bench, branch=replace(bench.branch, window_size=16))  # type: ignore[type-var]
    study = Study(bench, lab, Plan(), tmp_path, tuning=tuning)
    for stage in ("masks", "masks_and_weights"):
        study.measure(unit("ablation", stage=stage))
    assert windows == {"ranked": [8], "tuned": [16], "measured": [16, 16]}
    with pytest.raises(ValueError, match=r"other settings \(train_branch"):
        Study(tuning, lab, Plan(), tmp_path)
