"""`run.json` at each instant of a run, and the summary at its end."""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sparse_hf.figures import Figure
from sparse_hf_training.config import RunConfig
from sparse_hf_training.masks.learning import MaskLearning
from sparse_hf_training.observe.run_record import RunRecord, command_line, package_versions, recorded
from sparse_hf_training.observe.summary import RunSummary, last_values
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.trainer import TrainingDiverged
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


def document(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "run" / "run.json").read_text())
    return loaded


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Raises `error` in a step of a run."""
    begin = MaskLearning.begin_step

    def stopping(self: MaskLearning, now: int, max_steps: int) -> None:
        if now == step:
            raise error
        begin(self, now, max_steps)

    monkeypatch.setattr(MaskLearning, "begin_step", stopping)


def test_finished_run(run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/somewhere/bin/sparse-hf", "train", "x.yaml"])
    values = run_values(data={**run_values()["data"], "seed": 3}, trainer={"seed": 5})
    result = run(values)
    written = document(tmp_path)
    assert written["status"] == "finished"
    assert build(RunConfig, written["config"]) == build(RunConfig, values)
    assert written["seeds"] == {"trainer": 5, "data": 3, "evaluation": 1234, "masks": 0}
    (session,) = written["sessions"]
    assert session["command"] == ["sparse-hf", "train", "x.yaml"]
    assert session["world_size"] == 1 and session["resumed_from_step"] is None and "reason" not in session
    assert session["versions"]["torch"] == metadata.version("torch") and session["devices"]
    assert datetime.fromisoformat(session["start"]) <= datetime.fromisoformat(session["end"])
    assert "/opt/somewhere" not in json.dumps(written)

    summary = written["result"]
    assert summary["steps"] == 4 and summary["tokens"] == 4 * 256 and summary["head_sparsity"] == 0.5
    last = [row for row in result.history if "loss" in row][-1]
    assert summary["losses"]["loss/kl"] == last["loss/kl"] and summary["sparsity"]["sparsity/target"] == 0.5
    assert [figure["case"].split(",")[0] for figure in summary["figures"]][:2] == ["recall needle", "loss on held text"]
    assert not list((tmp_path / "run").glob(".run.json*"))


def test_record_says_running_until_the_end(run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    begin = MaskLearning.begin_step

    def look(self: MaskLearning, now: int, max_steps: int) -> None:
        found.append(document(tmp_path))
        begin(self, now, max_steps)

    monkeypatch.setattr(MaskLearning, "begin_step", look)
    run(run_values(evaluation={}, trainer={"max_steps": 1}))
    assert found[0]["status"] == "running" and found[0]["sessions"][0]["end"] is None and "result" not in found[0]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (TrainingDiverged("the loss is nan\nin step 3"), "failed", "TrainingDiverged: the loss is nan in step 3"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt: "),
    ],
)
def test_run_that_ends_badly_says_why_and_goes_on(
    run_values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: str,
    reason: str,
) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, 3, error)
        with pytest.raises(type(error)):
            run(run_values(evaluation={}))
    written = document(tmp_path)
    assert written["status"] == status and written["sessions"][0]["reason"] == reason
    assert written["sessions"][0]["end"] and "result" not in written

    run(run_values(evaluation={}))
    written = document(tmp_path)
    assert written["status"] == "finished"
    assert [session["status"] for session in written["sessions"]] == [status, "finished"]
    assert written["sessions"][1]["resumed_from_step"] == 2


def test_configuration_that_never_worked_leaves_no_record(run_values: Values, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        run(run_values(model=str(tmp_path / "none")))
    assert not (tmp_path / "run").exists()


def test_session_that_never_ended_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    RunRecord.begin(path, config={}, seeds={}, session={"world_size": 4})
    RunRecord.begin(path, config={}, seeds={}, session={"world_size": 2}).end("finished")
    sessions = json.loads(path.read_text())["sessions"]
    assert [(s["status"], s["world_size"]) for s in sessions] == [("killed", 4), ("finished", 2)]
    assert sessions[0]["end"] is None


def test_torn_record_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for torn in ("", "{", "[]", '{"sessions": [1]}'):
        path.write_text(torn)
        RunRecord.begin(path, config={}, seeds={}, session={})
        assert len(json.loads(path.read_text())["sessions"]) == 1


def test_full_disk_does_not_hide_why_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = RunRecord.begin(tmp_path / "run.json", config={}, seeds={}, session={})

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_hf_training.observe.run_record.replace_json", full)
    with pytest.raises(TrainingDiverged, match="the loss is nan"), recorded(record):
        raise TrainingDiverged("the loss is nan")
    assert "still says running" in caplog.text and "No space left" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"


def test_command_line_names_no_place_of_this_machine() -> None:
    assert command_line(["/usr/x/bin/sparse-hf", "train", "a.yaml"]) == ["sparse-hf", "train", "a.yaml"]
    assert command_line(["scripts/train.py", "a=1"]) == ["scripts/train.py", "a=1"]


def test_versions_are_of_what_is_installed() -> None:
    found = package_versions()
    assert found["transformers"] == metadata.version("transformers") and found["python"] == sys.version.split()[0]
    assert "-" not in found.values()


def test_last_values() -> None:
    history = [{"loss": 2.0, "loss/lm": 1.0, "step": 1}, {"loss": 1.5, "step": 2}, {"losses": 9.0, "train_loss": 3.0}]
    assert last_values(history, ["loss"]) == {"loss": 1.5, "loss/lm": 1.0}


def test_rows_of_the_summary() -> None:
    figures = (
        Figure(case="recall needle", value=0.75, unit="share", lower_is_better=False, baseline=1.0),
        Figure(case="KV cache", value=2048, unit="bytes", lower_is_better=True, baseline=4096),
        Figure(case="loss", value=1.25, unit="nats/token", lower_is_better=True),
    )
    summary = RunSummary(
        stage="masks",
        steps=1000,
        tokens=1_234_567,
        seconds=3725.4,
        losses={"loss/kl": 0.12345},
        sparsity={"sparsity/target": 0.5},
        head_sparsity=0.5,
        throughput={"throughput/tokens_per_second": 12345.6, "throughput/mfu": 0.4321},
        figures=figures,
        artefact=Path("run/artefact"),
    )
    rows = {name: (value, other) for name, value, other in summary.rows()}
    assert rows["tokens"] == ("1,234,567", "") and rows["training time"] == ("1:02:05", "")
    assert rows["tokens/s"] == ("12,346", "") and rows["MFU"] == ("43.2%", "")
    assert rows["loss/kl"] == ("0.1235", "") and rows["sparsity/target"] == ("50.0%", "")
    assert rows["recall needle"] == ("0.75", "1.00") and rows["KV cache"] == ("2,048 bytes", "4,096 bytes")
    assert rows["loss"] == ("1.2500 nats/token", "")
    assert "artefact" not in json.dumps(summary.to_dict())
