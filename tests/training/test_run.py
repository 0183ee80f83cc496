"""`run_training` from its configuration to its artefact, in all stages, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from sparse_hf import AutoSparseModelForCausalLM
from sparse_hf.artefact import load_artefact
from sparse_hf.head_masks import round_scores
from sparse_hf.patching import get_handle
from sparse_hf_training.config import RunConfig
from sparse_hf_training.engines.judging import DENSE_NAME, JudgeDenseCallback
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


def test_masks_are_learned_judged_and_exported(run_values: Values, tmp_path: Path, figure_keys: set[str]) -> None:
    result = run(run_values(trainer={"eval_strategy": "steps", "eval_steps": 2}))
    artefact = load_artefact(result.artefact)
    masks = get_handle(result.model).head_masks
    assert torch.equal(artefact.head_masks, masks) and int((masks == 0).sum()) == 2
    assert result.scores is not None and artefact.scores is not None
    assert torch.equal(artefact.scores, result.scores) and torch.equal(round_scores(result.scores, 0.5), masks)
    assert artefact.training["stage"] == "masks" and artefact.training["steps"] == 4
    assert not (result.artefact / "model.safetensors").exists()
    reloaded = AutoSparseModelForCausalLM.from_pretrained(result.artefact)
    assert torch.equal(get_handle(reloaded).head_masks, masks)
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [set(row) for row in figures] == [figure_keys] * 3
    recall, loss, kv = figures
    assert recall["case"].startswith("recall needle, 256 tokens") and recall["unit"] == "share"
    assert result.dense is not None and result.sparse is not None
    assert (loss["value"], loss["baseline"]) == (result.sparse.text_loss, result.dense.text_loss)
    assert loss["value"] != loss["baseline"] and kv["value"] < kv["baseline"]
    judged = [row["step"] for row in result.history if "eval_recall/needle" in row]
    assert judged == [2, 4]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "run.json", "history.json", "data.json", "mask_history.png"} <= left
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report == json.loads(json.dumps(result.data.report.to_dict())) and report["sources"]


def test_dense_judgement_is_kept_for_engines_that_go_on_with_moved_weights(run_values: Values, tmp_path: Path) -> None:
    result = run(run_values(stage="masks_and_weights", objective={"lm": 1.0, "kl": 0.0}, trainer={"max_steps": 2}))
    trainer: Any = None  # neither it nor a judge is asked
    callback = JudgeDenseCallback(trainer, trainer, tmp_path / "run" / DENSE_NAME)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.on_train_begin(arguments, TrainerState(global_step=2), TrainerControl())
    assert callback.judgement is not None and result.dense is not None
    assert callback.judgement.to_dict() == result.dense.to_dict()


def test_judging_in_between_changes_no_gate(run_values: Values, tmp_path: Path) -> None:
    plain = run(run_values(output_dir=str(tmp_path / "a")))
    judged = run(run_values(output_dir=str(tmp_path / "b"), trainer={"eval_strategy": "steps", "eval_steps": 1}))
    assert plain.scores is not None and judged.scores is not None and torch.equal(plain.scores, judged.scores)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"preserve_rng_state": True}}])
def test_gradient_checkpointing_changes_nothing(
    run_values: Values, tmp_path: Path, options: dict[str, dict[str, bool]]
) -> None:
    plain = run(run_values(output_dir=str(tmp_path / "a")))
    trainer = {"gradient_checkpointing": True, **options}
    recomputed = run(run_values(output_dir=str(tmp_path / "b"), trainer=trainer))
    assert plain.scores is not None and recomputed.scores is not None
    torch.testing.assert_close(recomputed.scores, plain.scores)
    assert recomputed.sparse == plain.sparse
    a, b = (json.loads((tmp_path / name / "figures.json").read_text())[-1] for name in "ab")
    assert a["unit"] == "bytes" and (a["value"], a["baseline"]) == (b["value"], b["baseline"])


def test_weights_then_sft_from_the_artefact(run_values: Values, model_folder: Path, tmp_path: Path) -> None:
    objective = {"lm": 1.0, "kl": 0.5}
    values = run_values(stage="masks_and_weights", output_dir=str(tmp_path / "first"), objective=objective)
    first = run(values)
    saved = AutoModelForCausalLM.from_pretrained(first.artefact)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, first.model.state_dict()[name]), name
        assert not torch.equal(tensor, base.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(first.artefact)("the ship").input_ids

    # The artefact is a model, its masks, and the tokenizer.
    sft = run_values(
        stage="sft",
        model=str(first.artefact),
        sparse=str(first.artefact),
        output_dir=str(tmp_path / "second"),
        objective={"lm": 1.0, "kl": 0.0},
        trainer={"max_steps": 2},
    )
    second = run(sft)
    assert second.scores is None
    artefact = load_artefact(second.artefact)
    assert torch.equal(artefact.head_masks, load_artefact(first.artefact).head_masks)
    reloaded = AutoSparseModelForCausalLM.from_pretrained(second.artefact)
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert not torch.equal(reloaded.lm_head.weight, saved.lm_head.weight)


def test_sft_with_masks_on_text_alone(run_values: Values) -> None:
    masks = [[1, 0], [0, 0]]
    values = run_values(
        stage="sft",
        sparse={"sparse": {"method": "streaming", "num_sink_tokens": 2, "window_size": 8}, "head_masks": masks},
        evaluation={},
    )
    values["data"]["recall"] = None
    result = run(values)
    assert load_artefact(result.artefact).head_masks.tolist() == masks
    assert result.dense is None and result.sparse is None
    assert json.loads((result.artefact.parent / "figures.json").read_text()) == []
    assert result.data.packing.rows > 4


def test_sft_needs_a_sparse_head(run_values: Values) -> None:
    sparse = {"sparse": {"method": "streaming", "num_sink_tokens": 2, "window_size": 8}, "head_masks": "all_full"}
    with pytest.raises(ValueError, match="every head is dense"):
        run(run_values(stage="sft", sparse=sparse))


def test_recall_alone(run_values: Values) -> None:
    values = run_values(evaluation={}, trainer={"max_steps": 1})
    values["data"]["recall"]["ratio"] = 1.0
    rows = run(values).data.rows
    assert len(rows) == 1 and torch.equal(rows[0]["position_ids"], torch.arange(256))  # type: ignore[arg-type]


def test_finished_run_can_be_started_again(run_values: Values) -> None:
    first = run(run_values())
    again = run(run_values())
    assert first.scores is not None and again.scores is not None and torch.equal(first.scores, again.scores)
    assert again.sparse == first.sparse and again.dense == first.dense
    losses = [[row["loss"] for row in result.history if "loss" in row] for result in (first, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_another_configuration_is_refused(run_values: Values) -> None:
    first = run(run_values(evaluation={}, trainer={"max_steps": 1}))
    before = {path: path.read_bytes() for path in first.artefact.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"another configuration .*; evaluation, trainer differ"):
        run(run_values(trainer={"max_steps": 2}))
    with pytest.raises(ValueError, match="holds a run already"):
        run(run_values(evaluation={}, trainer={"max_steps": 1}, resume=False))
    assert before == {path: path.read_bytes() for path in first.artefact.iterdir() if path.is_file()}


def test_a_run_that_cannot_train_claims_no_folder(run_values: Values, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set trainer.bf16=true instead of fp16"):
        run(run_values(trainer={"fp16": True}))
    assert not (tmp_path / "run" / "config.yaml").exists(), "the corrected configuration would be refused"


def test_checkpoints_of_nobody_are_left_alone(run_values: Values, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds checkpoints but no config\.yaml"):
        run(run_values())


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("", "no rows|no token|fewer than one row"), ("one word", "fewer than one row")],
)
@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_text_that_cannot_be_used(
    run_values: Values, tmp_path: Path, section: str, text: str | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    values = run_values()
    values[section]["text"] = {"path": str(path)} if section == "evaluation" else [{"path": str(path)}]
    with pytest.raises(ValueError, match=message):
        run(values)
    # A run that never began does not keep its folder from the corrected one.
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_missing_model(run_values: Values, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model .* cannot be loaded"):
        run(run_values(model=str(tmp_path / "no" / "model")))
    assert not (tmp_path / "run" / "config.yaml").exists()
    run(run_values(evaluation={}, trainer={"max_steps": 1}))
