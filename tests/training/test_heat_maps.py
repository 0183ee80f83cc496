"""Mask maps over time: kept in the run's folder, drawn, and read back from wandb's and tensorboard's own files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_hf_training.config import RunConfig
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.masks.learning import MaskLearning
from sparse_hf_training.observe.config import ObserveConfig
from sparse_hf_training.observe.heat_maps import IMAGE_TAG, MaskHistory, MaskHistoryCallback, MaskSnapshot, snapshot_of
from sparse_hf_training.plots import mask_image, plot_mask_history
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]
WandbRows = Callable[[Path], Iterator[dict[str, Any]]]

SCALARS = {
    "loss",
    "loss/kl",
    "loss/penalty",
    "sparsity/target",
    "sparsity/expected",
    "sparsity/realised",
    "lagrangian/linear",
    "lagrangian/quadratic",
    "throughput/tokens_per_second",
}


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


def snapshot(step: int, value: float = 0.5) -> MaskSnapshot:
    return MaskSnapshot(step=step, target=None, scores=[[value, 1.0]], openness=[[value, 0.25]])


def test_history_is_appended_and_read_back(tmp_path: Path) -> None:
    history = MaskHistory(tmp_path / "h.jsonl")
    assert history.read() == []
    for step in (0, 5, 10):
        history.append(snapshot(step))
    assert history.read() == [snapshot(0), snapshot(5), snapshot(10)]


def test_a_line_that_was_cut_off_is_no_snapshot_and_spoils_no_other(tmp_path: Path) -> None:
    history = MaskHistory(tmp_path / "h.jsonl")
    for step in (0, 5, 10):
        history.append(snapshot(step))
    whole = history.path.read_bytes()
    history.path.write_bytes(whole[:-20])
    assert [s.step for s in history.read()] == [0, 5]
    history.keep_up_to(5)
    history.append(snapshot(10))
    assert history.path.read_bytes() == whole


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    history = MaskHistory(tmp_path / "h.jsonl")
    for step in (0, 5, 10):
        history.append(snapshot(step))
    history.keep_up_to(7)
    assert [s.step for s in history.read()] == [0, 5]


def test_snapshot_is_what_the_gates_say() -> None:
    learning = MaskLearning(MaskLearningConfig(init_log_alpha=0.0), 2, 3)
    taken = snapshot_of(learning, 7, 0.25)
    assert (taken.step, taken.target) == (7, 0.25)
    # P(z = 0) of a hard-concrete gate at log_alpha 0: sigmoid(2/3 * ln(0.1 / 1.1)).
    closed = 1 / (1 + np.exp(-2 / 3 * np.log(0.1 / 1.1)))
    np.testing.assert_allclose(taken.openness, np.full((2, 3), 1 - closed), atol=1e-4)
    np.testing.assert_allclose(taken.scores, np.zeros((2, 3)))


def test_full_disk_costs_entries_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: MaskHistory, snapshot: MaskSnapshot) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MaskHistory, "append", full)
    callback = MaskHistoryCallback(MaskLearning(MaskLearningConfig(), 1, 2), tmp_path / "h.jsonl", every=1)
    callback._write(snapshot(3))
    assert "step 3 is missing" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_history_steps": 0}, "mask_history_steps must be positive"),
        ({"mask_image_steps": -1}, "mask_image_steps must not be negative"),
        ({"peak_tflops": 0.0}, "peak_tflops must be positive"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObserveConfig(**values)


def test_intervals_follow_the_length_of_the_run() -> None:
    config = ObserveConfig()
    assert [config.history_interval(steps) for steps in (4, 100, 1000)] == [1, 1, 10]
    assert [config.image_interval(steps) for steps in (4, 100, 1000)] == [1, 10, 100]
    assert ObserveConfig(mask_image_steps=0).image_interval(1000) == 0


def test_run_keeps_and_draws_its_masks(run_values: Values, tmp_path: Path) -> None:
    result = run(run_values(evaluation={}, observe={"mask_history_steps": 3}))
    history = MaskHistory(tmp_path / "run" / "mask_history.jsonl").read()
    assert [s.step for s in history] == [0, 3, 4]
    assert history[0].target is None and history[-1].target == pytest.approx(0.5)
    assert result.scores is not None
    torch.testing.assert_close(torch.tensor(history[-1].scores), result.scores, atol=1e-4, rtol=0)
    assert history[0].openness != history[-1].openness
    assert (tmp_path / "run" / "mask_history.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_run_has_the_history_of_one_left_alone(run_values: Values, tmp_path: Path) -> None:
    run(run_values(evaluation={}))
    path = tmp_path / "run" / "mask_history.jsonl"
    alone = path.read_text()
    (tmp_path / "run" / "checkpoint-4" / "complete.json").unlink()
    # Other settings of what is observed do not make it another run.
    run(run_values(evaluation={}, observe={"mask_image_steps": 1}))
    assert path.read_text() == alone


def test_map_has_a_cell_per_head(tmp_path: Path) -> None:
    plain, marked = mask_image([[0.0, 0.0], [0.0, 0.0]], "a"), mask_image([[0.0, 0.0], [0.0, 1.0]], "a")
    assert plain.dtype == np.uint8 and plain.shape[2] == 3 and plain.shape == marked.shape
    # Apart from the title, what changes is the cell of layer 1 and head 1: in the lower half of the map.
    rows, columns = np.nonzero((plain != marked).any(2))
    cell = rows > plain.shape[0] // 4
    assert cell.any() and columns[cell].min() > 0.3 * plain.shape[1] and rows[cell].min() > 0.4 * plain.shape[0]
    with pytest.raises(ValueError, match="history of the masks is empty"):
        plot_mask_history([], tmp_path / "x.png")
    plot_mask_history([snapshot(0)], tmp_path / "one.png")
    plot_mask_history([snapshot(n) for n in range(40)], tmp_path / "many.png")


def test_wandb_offline_gets_figures_and_maps(
    run_values: Values, wandb_rows: WandbRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # what an earlier run in this process was told
    result = run(
        run_values(evaluation={}, observe={"mask_image_steps": 2}, trainer={"report_to": ["wandb"], "max_steps": 3})
    )
    wandb.finish()
    wandb.teardown()  # waits for the process that writes the file
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = list(wandb_rows(file))
    assert {f"train/{name}" for name in SCALARS} <= {name for row in rows for name in row}
    logged = {row["train/global_step"]: row["train/sparsity/target"] for row in rows if "train/sparsity/target" in row}
    assert logged == {row["step"]: row["sparsity/target"] for row in result.history if "sparsity/target" in row}
    images = {row["train/global_step"]: row for row in rows if f"{IMAGE_TAG}._type" in row}
    assert sorted(images) == [2, 3]
    for row in images.values():
        assert row[f"{IMAGE_TAG}._type"] == "image-file"
        assert (file.parent / "files" / row[f"{IMAGE_TAG}.path"]).read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_figures_and_maps(run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    result = run(
        run_values(
            evaluation={}, observe={"mask_image_steps": 2}, trainer={"report_to": ["tensorboard"], "max_steps": 3}
        )
    )
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {f"train/{name}" for name in SCALARS} <= set(events.Tags()["scalars"])
    logged = {event.step: event.value for event in events.Scalars("train/sparsity/expected")}
    expected = {row["step"]: row["sparsity/expected"] for row in result.history if "sparsity/expected" in row}
    assert logged == pytest.approx(expected)
    assert [event.step for event in events.Images(IMAGE_TAG)] == [2, 3]
    assert events.Images(IMAGE_TAG)[0].encoded_image_string.startswith(b"\x89PNG")
