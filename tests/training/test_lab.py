"""The lab: generation against a loop without a cache, losses and bytes by hand, cells that survive an interruption."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

import sparse_hf_training.evaluation.lab as lab_module
from sparse_hf import SparseCache, SparseConfig, Streaming, Triangle, dense, sparsify
from sparse_hf.summary import sparsity_summary
from sparse_hf_training.data import PackedTextDataset, pack_documents, text_document
from sparse_hf_training.evaluation import evaluate_text_loss
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.footprint import Footprint, measure_footprint
from sparse_hf_training.evaluation.generation import exact_by_generation, new_cache, prefill
from sparse_hf_training.evaluation.lab import DENSE, Lab, check_length
from sparse_hf_training.evaluation.losses import answer_losses, text_loss
from sparse_hf_training.evaluation.report import LabReport
from sparse_hf_training.objectives import LossHead
from sparse_hf_training.tasks import Filler, NeedleTask, RecallSample, make_task

MASKS = ((1, 0), (0, 1))


@pytest.fixture
def model(model_folder: Path) -> Any:
    """Half of its heads read 2 sinks and 8 tokens; attention is sharpened, or windows would change little."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 8
    return sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks=MASKS))


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What comes next, by whole forward passes without a cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


def own_sample(model: Any, seed: int, num_tokens: int = 60) -> RecallSample:
    """A sample of so many tokens and two questions that the model answers as it stands there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 300, (num_tokens,), generator=generator).tolist()
    questions, answers = [], []
    for count in (4, 3):
        start = len(ids)
        ids += torch.randint(2, 300, (5,), generator=generator).tolist()
        first = len(ids)
        ids += greedy(model, ids, count)
        answers.append((first, len(ids)))
        ids.append(7)
        questions.append((start, len(ids)))
    return RecallSample(task="own", input_ids=tuple(ids), answer_spans=tuple(answers), question_spans=tuple(questions))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("context_first", "chunk"), [(False, None), (True, None), (True, 13), (False, 13)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_finds_what_a_model_writes(
    model: Any, sparse: bool, context_first: bool, chunk: int | None, batch_size: int
) -> None:
    with nullcontext() if sparse else dense(model):
        right = [own_sample(model, seed) for seed in range(4)]
        samples = [right[0]]
        for sample in right[1:]:
            samples.append(sample)
            for start, end in sample.answer_spans:
                for place in (start, end - 1):
                    ids = list(sample.input_ids)
                    ids[place] = (ids[place] + 1) % 300
                    samples.append(replace(sample, input_ids=tuple(ids)))
        found = dict(
            exact_by_generation(model, samples, context_first=context_first, chunk=chunk, batch_size=batch_size)
        )
    assert len(found) == len(samples) == 16
    # A later answer depends on an earlier one that was changed, so only what is unchanged is surely right.
    assert [number for number, exact in sorted(found.items()) if exact] == [0, 1, 6, 11]


def test_samples_of_unequal_lengths_stand_in_batches_of_their_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [own_sample(model, 0), own_sample(model, 1, 59), own_sample(model, 2)]
    cut = replace(samples[2], input_ids=samples[2].input_ids[:-1])  # behind the last answer
    sizes: list[int] = []
    generate = type(model).generate

    def spy(self: Any, ids: torch.Tensor, **more: Any) -> Any:
        sizes.append(len(ids))
        return generate(self, ids, **more)

    monkeypatch.setattr(type(model), "generate", spy)
    found = dict(exact_by_generation(model, [*samples[:2], cut], batch_size=8))
    assert found == {0: True, 1: True, 2: True} and sizes == [2, 2, 1, 1]


def test_what_a_model_comes_with_for_generate_has_no_part_in_recall(model: Any) -> None:
    samples = [own_sample(model, seed) for seed in range(3)]
    ends = {sample.input_ids[sample.answer_spans[0][0]] for sample in samples}
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = sorted(ends)  # within an answer it ends nothing
    assert dict(exact_by_generation(model, samples)) == {0: True, 1: True, 2: True}
    assert model.generation_config.repetition_penalty == 5.0


def test_caches_are_those_of_the_attention_and_free_before_the_question(model: Any) -> None:
    ids = torch.randint(2, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model)
    assert isinstance(cache, SparseCache)
    prefill(model, ids, cache)
    assert cache.kv_bytes() == sparsity_summary(model, 64).kv_bytes < sparsity_summary(model, 64).dense_kv_bytes
    with dense(model):
        assert type(new_cache(model)) is DynamicCache


def test_a_wrong_token_ends_the_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = own_sample(model, 0)
    ids = list(sample.input_ids)
    ids[sample.answer_spans[0][0]] += 1
    calls: list[int] = []
    forward = type(model).forward

    def spy(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        calls.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", spy)
    assert dict(exact_by_generation(model, [replace(sample, input_ids=tuple(ids))])) == {0: False}
    assert calls == [65], "one prefill: its first token is wrong already"


def test_the_footprint_is_what_the_summary_counts(model: Any) -> None:
    ids = torch.randint(2, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    found = measure_footprint(model, ids, chunk=40, num_decoded=3)
    assert found.tokens == (40, 80, 120, 150, 151, 152, 153)
    assert found.kv_bytes == tuple(sparsity_summary(model, n).kv_bytes for n in found.tokens)
    assert found.peak == found.held == found.kv_bytes[-1] and found.device_peak is None
    assert found.prefill_density == pytest.approx(sparsity_summary(model, 150).attention_density, rel=1e-6)
    decoded = [(1 + (8 + 2) / n) / 2 for n in (151, 152, 153)]
    weights = [151 / 456, 152 / 456, 153 / 456]
    assert found.decode_density == pytest.approx(sum(d * w for d, w in zip(decoded, weights, strict=True)), rel=1e-6)
    with dense(model):
        full = measure_footprint(model, ids, chunk=150, num_decoded=0)
    assert (full.kv_bytes, full.prefill_density, full.decode_density) == ((2 * 2 * 2 * 150 * 8 * 4,), 1.0, 1.0)
    assert full.byte_tokens == 150 * full.held / 2
    assert Footprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="one sequence"):
        measure_footprint(model, ids.expand(2, -1))


def test_the_peak_is_held_before_the_end(model_folder: Path) -> None:
    """Dense last rows keep every key up to a length; from there on the cache is freed."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), min_seq_len=100))
    ids = torch.randint(2, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    found = measure_footprint(model, ids, chunk=30, num_decoded=0)
    assert found.peak == found.kv_bytes[2] > 5 * found.held


def test_the_density_is_that_of_the_prefill_that_generation_makes(model_folder: Path) -> None:
    """In small chunks the last rows, which a triangle reads densely, are all rows."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    sparsify(model, SparseConfig(sparse=Triangle(num_sink_tokens=2, window_size=8, num_last_tokens=16)))
    ids = torch.randint(2, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    whole = measure_footprint(model, ids, chunk=16, num_decoded=1)
    assert whole.prefill_density == pytest.approx(sparsity_summary(model, 150).attention_density, rel=1e-6)
    assert measure_footprint(model, ids, chunk=16, num_decoded=1, prefill_chunk=16).prefill_density == 1.0
    assert whole.prefill_density < 0.4 and whole.decode_density == 1.0


def test_losses_by_hand(model: Any, story: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = PackedTextDataset(pack_documents([text_document(story, tokenizer)], 128)[0])
    chosen = [rows[n] for n in range(3)]
    found = text_loss(model, chosen, 128)
    assert found.mean == pytest.approx(evaluate_text_loss(model, rows, num_rows=3), rel=1e-5)
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in chosen]), use_cache=False).logits[:, :-1]
    targets = torch.stack([row["labels"] for row in chosen])[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert found.rows == pytest.approx(losses.mean(1).tolist(), rel=1e-5)
    # The token at position p + 1 is predicted at position p; the last position predicts none.
    by_bin = [losses[:, start : start + 8].mean().item() for start in range(0, 128, 8)]
    assert found.bins == pytest.approx(by_bin, rel=1e-5) and found.edges == tuple(range(0, 129, 8))
    samples, expected = [own_sample(model, seed) for seed in (3, 4, 5)], []
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0]
        places = [p for start, end in sample.answer_spans for p in range(start, end)]
        expected.append(F.cross_entropy(logits[[p - 1 for p in places]], torch.tensor(sample.input_ids)[places]).item())
    for batch_size in (1, 2, 8):
        assert list(answer_losses(model, LossHead(model), samples, batch_size)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no rows"):
        text_loss(model, [], 128)


@pytest.fixture
def lab(filler: Filler, story: str, tokenizer: PreTrainedTokenizerFast) -> Lab:
    rows = PackedTextDataset(pack_documents([text_document(story, tokenizer)], 300)[0])
    tasks = [NeedleTask(num_needles=2), make_task("key_value", num_pairs=2)]
    return Lab(
        tokenizer=tokenizer,
        tasks=tasks,
        filler=filler,
        rows=rows,
        seq_len=300,
        num_samples=3,
        num_rows=2,
        num_loss_samples=2,
        num_decoded=2,
    )


def test_an_interrupted_evaluation_goes_on(lab: Lab, model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    whole = lab.measure(model, "sparse", CellStore(tmp_path / "whole", lab.settings(model)))
    asked: list[str] = []
    original = exact_by_generation

    def interrupted(model: Any, samples: list[RecallSample], **more: Any) -> Iterator[tuple[int, bool]]:
        asked.append(samples[0].task)
        found = original(model, samples, **more)
        if asked == ["needle", "key_value"]:
            yield from itertools.islice(found, 1)
            raise KeyboardInterrupt
        yield from found

    monkeypatch.setattr(lab_module, "exact_by_generation", interrupted)
    store = CellStore(tmp_path / "cut", lab.settings(model))
    with pytest.raises(KeyboardInterrupt):
        lab.measure(model, "sparse", store)
    assert [path.name.split("--")[1][:6] for path in (tmp_path / "cut" / "cells").iterdir()] == ["needle"]
    steps: list[tuple[str, int]] = []
    again = lab.measure(
        model, "sparse", CellStore(tmp_path / "cut", lab.settings(model)), lambda *step: steps.append(step)
    )
    assert asked == ["needle", "key_value", "key_value"], "the finished cell is not measured again"
    assert sum(done for _, done in steps) == lab.steps
    assert strip_times(again.to_dict()) == strip_times(whole.to_dict())
    assert model.training is False


def test_answers_that_generate_gives_otherwise_are_counted(
    lab: Lab, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = replace(lab, answers="forward", num_checked=2)
    monkeypatch.setattr(lab_module, "answered", lambda model, samples: [True] * len(samples))
    monkeypatch.setattr(lab_module, "exact_by_generation", lambda *_, **__: iter([(0, True), (1, False)]))
    found = lab.measure(model, "sparse", CellStore(tmp_path, lab.settings(model)))
    assert [(task.num_exact, task.num_checked, task.num_differing) for task in found.tasks] == [(3, 2, 1)] * 2
    with pytest.raises(ValueError, match=r"other settings \(answers"):
        CellStore(tmp_path, replace(lab, answers="generate").settings(model))
    with pytest.raises(ValueError, match="answers must be one of"):
        replace(lab, answers="guess")  # type: ignore[arg-type]


def test_everything_fits_into_the_models_context(lab: Lab, model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, max_position_embeddings=300)
    sparsify(model.eval(), SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16)))
    found = lab.measure(model, "sparse", CellStore(tmp_path, lab.settings(model)))
    assert found.footprint.tokens[-1] == 300 == lab.seq_len


def strip_times(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "tasks": [{**task, "seconds": 0} for task in result["tasks"]]}


def test_cells_of_other_settings_are_refused_and_kept(lab: Lab, model: Any, tmp_path: Path) -> None:
    store = CellStore(tmp_path / "out", lab.settings(model))
    store.get("sparse", "needle", lambda: {"value": 1})
    other = replace(lab, seed=5)
    with pytest.raises(ValueError, match=r"other settings \(seed 1234 != 5\).*--overwrite"):
        CellStore(tmp_path / "out", other.settings(model))
    assert CellStore(tmp_path / "out", lab.settings(model)).get("sparse", "needle", lambda: {}) == {"value": 1}
    over = CellStore(tmp_path / "out", other.settings(model), overwrite=True)
    assert over.get("sparse", "needle", lambda: {"value": 2}) == {"value": 2}
    with pytest.raises(ZeroDivisionError):
        over.get("sparse", "chain", lambda: {"value": 1 / 0})
    assert not over.has("sparse", "chain")
    over.path("sparse", "needle").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="delete it, and it is measured again"):
        over.get("sparse", "needle", lambda: {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="something else than an evaluation"):
        CellStore(tmp_path / "mine", {})
    assert over.path("a", "vt(num_hops=2)") != over.path("a", "vt(num-hops=2)")


def test_settings_tell_models_texts_and_dtypes_apart(lab: Lab, model: Any, story: str, tokenizer: Any) -> None:
    before = lab.settings(model)
    other = replace(lab, filler=Filler.from_texts([story[1:]], tokenizer)).settings(model)
    assert [name for name in before if before[name] != other[name]] == ["text"]
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 0.5
    assert [name for name in before if before[name] != lab.settings(model)[name]] == ["weights"]
    assert lab.settings(model.to(torch.bfloat16))["dtype"] == "torch.bfloat16"


def test_dense_is_measured_with_the_attention_that_the_model_came_with(lab: Lab, model: Any, tmp_path: Path) -> None:
    store = CellStore(tmp_path, lab.settings(model))
    full, half = lab.measure(model, DENSE, store), lab.measure(model, "sparse", store)
    assert full.footprint.prefill_density == 1.0 > half.footprint.prefill_density
    assert full.text.rows != half.text.rows and full.footprint.held > half.footprint.held
    with dense(model):
        assert full.text.mean == pytest.approx(evaluate_text_loss(model, FirstAndMiddle(lab.rows)), rel=1e-6)
    assert [len(task.exact) for task in full.tasks] == [3, 3]
    assert [len(task.answer_losses) for task in full.tasks] == [2, 2]
    report = LabReport(name="half", about={}, settings=store.settings, dense=full, sparse=half)
    assert LabReport.load(report.save(tmp_path).parent) == report
    assert report.summary()["kv_share"] == half.footprint.held / full.footprint.held
    # A random model answers nothing, so that nothing can be judged, and the report says so.
    assert report.worst is None and len(report.failed_by_dense) == 2


class FirstAndMiddle(torch.utils.data.Dataset[Any]):
    """The two rows that two of a data set's are, at even distances."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.rows[index * len(self.rows) // 2]


def test_short_contexts_are_warned_of_or_refused(model: Any, model_folder: Path, recwarn: Any) -> None:
    assert check_length(model, 80) == 10 and not recwarn.list
    with pytest.warns(UserWarning, match=r"79 tokens are less than 8 times sinks and window \(80\)"):
        check_length(model, 79)
    with pytest.raises(ValueError, match="raise --seq-len"):
        check_length(model, 79, strict=True)
    kept = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert check_length(sparsify(kept, SparseConfig(sparse=Triangle())), 10) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples must be positive, got 0"),
        ({"tasks": []}, "tasks must be one or more, all different"),
        ({"tasks": [NeedleTask(), NeedleTask()]}, "all different, got"),
        ({"rows": []}, "holds no row of 300 tokens"),
    ],
)
def test_labs_without_an_outcome_are_refused(lab: Lab, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(lab, **change)
