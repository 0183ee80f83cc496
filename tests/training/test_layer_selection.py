"""The stage `layer_selection`: TriangleMix's layers from training rows, and the stages that start from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_hf.artefact import load_artefact
from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.triangle import TriangleCalibrator, TriangleOptions
from sparse_hf.layer_ranges import parse_ranges
from sparse_hf.methods import Dense, Triangle
from sparse_hf.patching import get_handle
from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]
TRIANGLE = {"num_layers": 1, "num_sink_tokens": 4, "window_size": 16, "num_last_tokens": 8, "held_out": 2}
SECTION = {"num_sequences": 4, "triangle": TRIANGLE}


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


@pytest.fixture
def values(run_values: Values) -> dict[str, Any]:
    return {**run_values(stage="layer_selection", layer_selection=SECTION), "trainer": {"use_cpu": True}}


def chosen_layers(result: RunResult) -> list[int]:
    (rule,) = load_artefact(result.artefact).config.rules
    return parse_ranges(rule.layers, 2)


def test_stage_gives_what_the_calibration_gives_on_the_same_rows(
    values: dict[str, Any], model_folder: Path, tmp_path: Path, figure_keys: set[str]
) -> None:
    result = run(values)
    rows = torch.stack([torch.as_tensor(result.data.rows[n]["input_ids"]) for n in range(4)])
    assert rows.shape == (4, 256)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    options = TriangleOptions(**TRIANGLE)  # type: ignore[arg-type]
    expected = calibrate(model, rows, TriangleCalibrator(options, Target.of(model, 256)), tmp_path / "own")
    artefact, own = load_artefact(result.artefact), load_artefact(tmp_path / "own")
    assert artefact.config == own.config and torch.equal(artefact.head_masks, own.head_masks)
    report, other = (json.loads((f / "calibration.json").read_text()) for f in (result.artefact, expected.folder))
    assert report["report"] == other["report"] and chosen_layers(result) == report["report"]["triangle_layers"]
    assert artefact.base_model_name_or_path == str(model_folder)
    (layer,) = chosen_layers(result)
    for state in get_handle(result.model).states:
        assert {type(method) for method in state.methods} == {Triangle if state.layer_idx == layer else Dense}
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    cases = [row["case"] for row in figures]
    assert cases[0] == "triangle layers" and "loss on held text" in cases and set(figures[0]) == figure_keys
    assert result.dense is not None and result.sparse is not None and result.dense != result.sparse


def test_a_second_run_measures_nothing_again(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values["evaluation"] = {}
    first = load_artefact(run(values).artefact)

    def measured_again(*args: Any) -> str:
        raise AssertionError("a sequence was looked at again")

    monkeypatch.setattr(TriangleCalibrator, "run", measured_again)
    assert load_artefact(run(values).artefact).config == first.config


def test_run_is_recorded(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.json` and `data.json`, of a session that failed and of one that went on from it."""

    def run_json() -> dict[str, Any]:
        return json.loads((tmp_path / "run" / "run.json").read_text())

    measure, seen = TriangleCalibrator.run, []

    def measured(*args: Any) -> Any:
        assert run_json()["status"] == "running"
        seen.append(args)
        if len(seen) == 3:
            raise ValueError("the third sequence\nis not to be read")
        return measure(*args)

    monkeypatch.setattr(TriangleCalibrator, "run", measured)
    with pytest.raises(ValueError, match="the third sequence"):
        run(values)
    failed = run_json()
    assert failed["status"] == "failed" and "ValueError: the third sequence" in failed["sessions"][0]["reason"]
    result = run(values)
    record = run_json()
    assert [session["status"] for session in record["sessions"]] == ["failed", "finished"]
    assert record["status"] == "finished" and "result" not in failed
    assert record["config"] == json.loads(json.dumps(build(RunConfig, values).to_dict()))
    assert record["seeds"] == {"data": 0, "evaluation": 1234}
    session = record["sessions"][1]
    assert (session["world_size"], session["engine"]) == (1, "one process, cpu") and "torch" in session["versions"]
    assert record["result"]["stage"] == "layer_selection"
    assert [row["case"] for row in record["result"]["figures"]] == [figure.case for figure in result.figures] != []
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report == json.loads(json.dumps(result.data.report.to_dict()))
    assert report["rows"] == 4 and report["sources"][0]["packing"]["documents"] == 5


def test_later_stages_start_from_its_layers(values: dict[str, Any], run_values: Values, tmp_path: Path) -> None:
    values["evaluation"] = {}
    layers = run(values)
    (layer,) = chosen_layers(layers)
    masks = run_values(
        output_dir=str(tmp_path / "masks"),
        sparse={"sparse": {"method": "triangle", "num_sink_tokens": 4, "window_size": 16, "num_last_tokens": 8}},
        masks={"end_head_sparsity": 0.5, "layers_from": str(layers.artefact), "init_log_alpha": 0.5},
        evaluation={},
    )
    learned = get_handle(run(masks).model).head_masks
    assert learned[1 - layer].tolist() == [1, 1] and int((learned[layer] == 0).sum()) == 1
    sft = run_values(
        output_dir=str(tmp_path / "sft"), stage="sft", sparse=str(layers.artefact), objective={"lm": 1.0, "kl": 0.0}
    )
    tuned = load_artefact(run(sft | {"evaluation": {}}).artefact)
    assert tuned.config.rules == load_artefact(layers.artefact).config.rules


def test_what_cannot_be_selected(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer has a Middle at 255 tokens"):
        run({**values, "layer_selection": {"triangle": {"window_size": 512}}})
    assert not (tmp_path / "run").exists()  # or the corrected configuration would be refused there
    with pytest.raises(ValueError, match="num_sequences must be positive"):
        build(RunConfig, {**values, "layer_selection": {"num_sequences": 0}})
    with pytest.raises(ValueError, match=r"layer_selection\.triangle: unknown keys \['layers'\]"):
        build(RunConfig, {**values, "layer_selection": {"triangle": {"layers": 3}}})
    with pytest.raises(ValueError, match=r"trainer\.max_steps must be positive"):
        build(RunConfig, {**values, "stage": "masks"})
